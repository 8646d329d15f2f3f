"""`exact: true` in one process: the same step as otherwise, and the same bits however its images come."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from factories import masked_batch, tiny_batch
from megdet.contract.run import make_every_layer_count
from megdet.distributed.gradients import GradientBuckets
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.inference.trained import place_model
from megdet.model.choice import make_detector
from megdet.recipe import MOST_EXACT_IMAGES, Recipe
from megdet.recipe_check import check_recipe
from megdet.recipe_file import load_recipe
from megdet.structures import Batch
from megdet.training.common_start import compare_commands
from megdet.training.compiled import check_compiler
from megdet.training.images_apart import without_padding
from megdet.training.step import StepResult, train_step
from megdet.training.trainer import Trainer, digest, trainer_of
from small_runs import ALONE
from tiny_steps import BATCH, FROZEN, make_trainer, split

KINDS = (
    *("verify", "verify-mask", "verify-cascade", "verify-retinanet", "verify-rfcn", "verify-heads", "verify-features"),
    "verify-light-head",
)


def frozen(name: str, precision: str) -> Recipe:
    """A detector whose images do not touch each other, so that its micro-batches may be cut as a test likes."""
    recipe = load_recipe(name)
    norms = [section for section, norm in recipe.model.norms.items() if section != "backbone" and norm == "batch"]
    model = recipe.model.with_norms(dict.fromkeys(norms, "none"))
    return replace(recipe, batch_size=4, bn_size=0, group_size=2, precision=precision, exact=True, model=model)


def trainer_for(recipe: Recipe) -> Trainer:
    torch.manual_seed(0)
    model = make_detector(recipe, 3)
    place_model(model, ALONE.device, recipe.precision)
    model.train()
    trainer = trainer_of(recipe, model, ALONE)
    make_every_layer_count(trainer)
    return trainer


def stepped(recipe: Recipe, batches: list[Batch], steps: int = 2, at_once: int = 1) -> tuple[str, list[StepResult]]:
    """A digest of all state and gradients after some steps on the same images, and the results of the steps."""
    trainer = trainer_for(recipe)
    assert trainer.apart is not None
    trainer.apart.at_once = at_once
    results = [train_step(trainer, batches, range(len(batches)), 0.01, number, ALONE) for number in range(steps)]
    assert not any(bool(result.verdict.is_left_out) for result in results)
    gradients = dict(zip(map(str, range(10**6)), trainer.buckets.gradients, strict=False))
    state = {f"{kind}.{name}": t for kind, own in trainer.state().items() for name, t in own.items()}
    reported = {f"{number}.{name}": t for number, own in enumerate(results) for name, t in own.means.items()}
    return digest({**state, **gradients, **reported}), results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_micro_batch_and_two_make_the_same_bits_with_every_detector(kind, precision):
    recipe = frozen(kind, precision)
    batch = masked_batch(4)
    whole, results = stepped(recipe, [batch])
    cut, _ = stepped(recipe, split(batch, 2), at_once=2)
    assert whole == cut
    assert all(math.isfinite(result.gradient_norm.item()) for result in results)
    assert stepped(recipe, split(batch, 1))[0] == whole


@pytest.mark.parametrize("changes", [{"at_once": 2}, {"at_once": 4}])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_images_of_a_batch_norm_group_make_the_same_bits_in_any_number_of_threads(precision, changes):
    recipe = replace(BATCH, batch_size=4, precision=precision, exact=True)
    batches = [tiny_batch(4)]
    assert stepped(recipe, batches)[0] == stepped(recipe, batches, **changes)[0]


@pytest.mark.parametrize("plan", ["block", "stage", "sqrt"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_recomputed_forward_makes_the_same_bits(precision, plan):
    recipe = replace(BATCH, batch_size=4, precision=precision, exact=True)
    batches = [tiny_batch(4)]
    assert stepped(recipe, batches)[0] == stepped(replace(recipe, recompute=plan), batches, at_once=3)[0]


@pytest.mark.parametrize("recipe", [BATCH, FROZEN])
def test_an_exact_step_is_the_plain_step_to_rounding(recipe):
    batches = split(tiny_batch(8), 4)
    plain, exact = make_trainer(recipe), make_trainer(replace(recipe, exact=True))
    for number in range(2):
        ours, theirs = (train_step(own, batches, range(2), 0.01, number, ALONE) for own in (exact, plain))
        for name, value in theirs.means.items():
            torch.testing.assert_close(ours.means[name], value, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(ours.gradient_norm, theirs.gradient_norm, rtol=1e-7, atol=1e-8)
    others = plain.model.state_dict()
    for name, tensor in exact.model.state_dict().items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-7, atol=1e-9, msg=name)


def test_gradients_added_in_floating_point_differ_where_micro_batches_do():
    """A control: what this file asks for does not hold without `exact`."""
    batch, found = tiny_batch(4), []
    for batches in ([batch], split(batch, 1)):
        trainer = trainer_for(replace(frozen("verify", "float32"), exact=False))
        assert type(trainer.buckets) is GradientBuckets
        train_step(trainer, batches, range(len(batches)), 0.01, 0, ALONE)
        found.append(digest(trainer.state()["model"]))
    assert found[0] != found[1]


def test_the_gradient_of_a_step_is_nearer_to_the_sum_in_float64_than_a_sum_in_float32_is(monkeypatch):
    trainer = trainer_for(replace(frozen("verify", "float32"), batch_size=8))
    assert trainer.apart is not None
    gradients, parts = trainer.apart.gradients, dict[int, list[Tensor]]()
    add = gradients.add

    def noting(place: int, gradient: Tensor) -> None:
        parts.setdefault(place, []).append(gradient.clone())
        add(place, gradient)

    monkeypatch.setattr(gradients, "add", noting)
    trainer.buckets.zero()
    trainer.apart.losses(masked_batch(8), "none", ALONE.device)
    trainer.buckets.finish()
    error_of_ours, error_of_float32 = 0.0, 0.0
    for place, own in parts.items():
        assert len(own) == 8
        truth = torch.stack(own).double().sum(0) / 8
        plain = torch.zeros_like(own[0])
        for part in own:
            plain += part
        error_of_ours += (trainer.buckets.gradients[place].double() - truth).square().sum().item()
        error_of_float32 += ((plain / 8).double() - truth).square().sum().item()
    assert error_of_ours < error_of_float32


@pytest.mark.parametrize("bad", [1e9, math.inf, math.nan])
def test_a_gradient_too_large_for_fixed_point_is_a_divergence_that_changes_nothing(bad, monkeypatch):
    trainer = make_trainer(replace(FROZEN, exact=True))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert trainer.apart is not None
    gradients = trainer.apart.gradients
    add = gradients.add

    def spoiled(place: int, gradient: Tensor) -> None:
        add(place, gradient.clone().fill_(bad) if place == 3 else gradient)

    monkeypatch.setattr(gradients, "add", spoiled)
    result = train_step(trainer, [tiny_batch(8)], range(1), 0.01, 0, ALONE)
    assert bool(result.verdict.is_left_out)
    assert result.gradient_norm.isnan()
    assert trainer.buckets.gradients[3].isnan().all()
    assert sum(bool(own.isnan().any()) for own in trainer.buckets.gradients) == 1
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_exact_does_not_go_with_a_compiler_or_with_more_images_than_a_sum_may_have():
    with pytest.raises(InputError, match="--compile does not go with exact"):
        check_compiler(replace(FROZEN, exact=True), ALONE.device)
    many = replace(FROZEN, exact=True, batch_size=2 * MOST_EXACT_IMAGES)
    with pytest.raises(InputError, match=f"batch_size is 8192: exact adds up at most {MOST_EXACT_IMAGES} images"):
        check_recipe(many, "a.yaml")
    check_recipe(replace(many, exact=False), "a.yaml")


def test_a_rank_on_another_kind_of_machine_is_refused_where_the_recipe_is_exact(monkeypatch):
    def beside_another(_: World, value: tuple[str, dict[str, str]]) -> list[tuple[str, dict[str, str]]]:
        host, facts = value
        kind = "the kind of machine"
        return [value, (host, facts | ({kind: "another processor"} if kind in facts else {}))]

    monkeypatch.setattr(World, "gather_objects", beside_another)
    two = World(0, 2, ALONE.device)
    compare_commands(FROZEN, {}, two)
    with pytest.raises(InputError, match=r"the kind of machine is .* another processor on rank 1 .*: exact needs"):
        compare_commands(replace(FROZEN, exact=True), {}, two)


def test_an_image_is_freed_of_the_rows_that_only_others_have():
    batch = masked_batch(4)
    counts = batch.targets.is_box.sum(1).tolist()
    assert len(set(counts)) > 1
    for place, count in enumerate(counts):
        image: Any = without_padding(batch[place : place + 1])
        assert image.targets.boxes.shape == (1, count, 4)
        assert image.targets.masks.frames.shape == (1, count, 5)
        assert torch.equal(image.targets.labels[0], batch.targets.labels[place, :count])
