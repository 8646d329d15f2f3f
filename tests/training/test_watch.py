"""An update that is not finite or explodes changes nothing, with every optimizer; healthy ones are not touched."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from divergence import losses_times
from factories import tiny_batch
from megdet.recipe import Optimizer, Recipe, Schedule, Watch
from megdet.training.step import StepResult, read_results
from megdet.training.trainer import Trainer
from megdet.training.watch import GradientWatch
from small_runs import CPU, state_of
from tiny_steps import BATCH, FROZEN, make_trainer, result_of, split

OPTIMIZERS: dict[str, tuple[Recipe, Optimizer, dict[str, Any]]] = {
    "sgd": (BATCH, Optimizer(ema_decay=0.9, clip_norm=1.0), {"noise_interval": 1}),
    "sgd in float32": (BATCH, Optimizer(ema_decay=0.9), {"precision": "float32"}),
    "no momentum": (BATCH, Optimizer(momentum=0.0), {}),
    "adamw": (BATCH, Optimizer(kind="adamw", agvm=True, base_lr=1e-3, ema_decay=0.9), {}),
    "lars": (BATCH, Optimizer(kind="lars", base_lr=1.0), {}),
    "lamb": (FROZEN, Optimizer(kind="lamb", base_lr=1e-3), {"noise_interval": 2, "group_size": 8}),
}
EXPLODES = Watch(window=1, explodes_at=50.0)


def recipe_of(name: str, watch: Watch = EXPLODES) -> Recipe:
    recipe, optimizer, changes = OPTIMIZERS[name]
    return replace(recipe, optimizer=optimizer, watch=watch, schedule=Schedule(warmup_steps=0), **changes)


def make_step(trainer: Trainer, number: int, seed: int, factor: float = 1.0) -> StepResult:
    size = trainer.recipe.images_per_group
    with losses_times(trainer, factor):
        return result_of(trainer, split(tiny_batch(8, seed=seed), size), number=number)


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state, and the gradient that is kept for the next step's noise scale, in steps that keep it."""
    kept = {key for key in state if key.startswith("noise.gradient.")}
    return {key: t for key, t in state.items() if key not in kept}, {key: state[key] for key in kept}


def without_count(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != "watch.num_left_out"}


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_that_is_left_out_changes_nothing_and_the_run_goes_on_as_without_it(name, factor):
    trainer, undisturbed = make_trainer(recipe_of(name)), make_trainer(recipe_of(name))
    for one in (trainer, undisturbed):
        make_step(one, 0, seed=0)
    before = state_of(trainer)
    result = make_step(trainer, 1, seed=1, factor=factor)
    assert result.verdict.is_left_out
    after = state_of(trainer)
    assert after.pop("watch.num_left_out") == 1 + before.pop("watch.num_left_out")
    before, (after, kept) = _split(before)[0], _split(after)
    assert after.keys() == before.keys()
    assert [key for key in after if not torch.equal(after[key], before[key])] == []
    assert all(tensor.isnan().all() for tensor in kept.values()), "of a step that says nothing now"
    for one in (trainer, undisturbed):
        assert not make_step(one, 2, seed=2).verdict.is_left_out
    ends = without_count(state_of(trainer)), without_count(state_of(undisturbed))
    assert [key for key in ends[1] if not torch.equal(ends[0][key], ends[1][key])] == []
    assert not torch.equal(ends[0]["model.fpn.lateral.0.0.weight"], before["model.fpn.lateral.0.0.weight"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_update_of_a_run_may_be_left_out(name):
    """The optimizer has no state yet, and its memory may hold anything."""
    trainer, undisturbed = make_trainer(recipe_of(name)), make_trainer(recipe_of(name))
    weights = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    assert make_step(trainer, 0, seed=0, factor=math.nan).verdict.is_left_out
    assert all(torch.equal(tensor, weights[key]) for key, tensor in trainer.model.state_dict().items())
    assert not any(tensor.any() for key, tensor in state_of(trainer).items() if key.startswith("momentum."))
    for one in (trainer, undisturbed):
        make_step(one, 1, seed=1)
    ends = without_count(state_of(trainer)), without_count(state_of(undisturbed))
    assert [key for key in ends[1] if not torch.equal(ends[0][key], ends[1][key])] == []


def test_the_noise_scale_measures_nothing_with_the_gradient_of_a_step_that_was_left_out():
    trainer = make_trainer(recipe_of("lamb"))
    make_step(trainer, 0, seed=0, factor=math.nan)  # the next step would compare its gradient with that of this one
    make_step(trainer, 1, seed=1)
    assert not trainer.noise.averages.any()
    make_step(trainer, 2, seed=2)
    make_step(trainer, 3, seed=3)
    assert trainer.noise.averages.all()


def test_a_gradient_explodes_beyond_a_multiple_of_the_median_of_the_last_applied_norms():
    watch = GradientWatch(Watch(window=3, explodes_at=10.0), CPU)

    def judged(norm: float, loss: float = 1.0) -> tuple[bool, float]:
        verdict = watch.judge(torch.tensor([loss, 0.0]), torch.tensor(norm))
        return bool(verdict.is_left_out), float(verdict.limit)

    assert judged(1.0) == (False, math.inf)
    assert judged(math.nan) == (True, math.inf)
    assert judged(3.0, loss=math.inf) == (True, math.inf)
    assert judged(1000.0) == (False, math.inf), "two norms are not enough"
    assert judged(2.0) == (False, math.inf)
    assert judged(20.5) == (True, 20.0), "the median of 1, 1000 and 2 is 2"
    assert judged(20.0) == (False, 20.0)
    assert judged(4.0) == (False, 200.0), "of 20, 1000 and 2, since 1 is the oldest"
    assert judged(41.0) == (True, 40.0), "of 20, 4 and 2"
    assert (int(watch.num_applied), int(watch.num_left_out)) == (5, 4)
    other = GradientWatch(Watch(window=3, explodes_at=10.0), CPU)
    other.restore({name: tensor.clone() for name, tensor in watch.state().items()})
    assert other.judge(torch.ones(2), torch.tensor(41.0)).is_left_out


def test_nothing_finite_explodes_where_the_recipe_says_so_or_where_half_of_the_norms_are_zero():
    for watch, norms in ((Watch(window=1, explodes_at=0.0), (1.0, 1e30)), (Watch(window=2), (0.0, 0.0, 5.0))):
        judge = GradientWatch(watch, CPU)
        assert not any(judge.judge(torch.ones(1), torch.tensor(norm)).is_left_out for norm in norms)


def test_the_line_of_a_step_says_why_its_update_was_left_out():
    trainer = make_trainer(recipe_of("sgd"))
    results = [make_step(trainer, number, 0, factor) for number, factor in enumerate((1.0, 1e4, math.nan))]
    whole, exploding, infinite = read_results(results, trainer)
    assert "left_out" not in whole
    norm = whole["gradient_norm"]
    assert exploding["left_out"] == (
        f"gradient_norm {exploding['gradient_norm']:.4g} is above {50 * norm:.4g}, 50 times the median of the last 1"
    )
    assert infinite["left_out"] == "rpn_objectness is not finite"
