"""The contract's own check: it passes where the contract holds, and fails for everything that breaks it."""

import importlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megdet.analysis.contract.cases import CASES, SHORT, chosen_cases, trials
from megdet.analysis.contract.verify import Verdict, relative_difference, verify
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe
from megdet.training.step import Trainer

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    """The packaged recipe, its images drawn elsewhere."""
    folder = tmp_path_factory.mktemp("data") / "verify"
    places = {
        "data.train_annotations": folder / "annotations/train.json",
        "data.train_images": folder / "train",
        "data.val_annotations": folder / "annotations/val.json",
        "data.val_images": folder / "val",
    }
    return load_recipe("verify", {key: str(path) for key, path in places.items()})


def check(verdict: Verdict) -> None:
    assert verdict.passes, verdict.sentence()
    assert verdict.sentence().startswith(f"pass: {len(verdict.rows)} layouts")
    assert 0 < verdict.worst.difference < 1e-9
    kinds = {"gradient", "reported", "rate", "weights", "buffers", "momentum", "detections"}
    for row in verdict.rows:  # a detector with group norm alone has no buffers
        assert set(row.of_kind) >= kinds - ({"buffers"} if row.case == "group-norm" else set()), row


@pytest.mark.distributed
def test_the_short_form_passes_and_compares_what_it_says(recipe):
    verdict = verify(recipe, (1, 2, 3), cases=SHORT, steps=3)
    check(verdict)
    rows = {(row.case, row.stopped_on, row.devices): row for row in verdict.rows}
    assert {devices for case, _, devices in rows if case == "base"} == {1, 2, 3}
    assert rows["bn-all", None, 3].lane_width == 3
    assert rows["base", None, 1].rounds == 4
    assert rows["base", None, 3].difference > 0, "sums in another order are not bitwise the same"
    assert "averages" in rows["resume", 3, 1].of_kind
    assert rows["new-process", 3, 3].difference == 0


@pytest.mark.slow
@pytest.mark.distributed
def test_every_case_passes_on_all_device_counts(recipe):
    verdict = verify(recipe, cases=tuple(CASES))
    check(verdict)
    assert {row.case for row in verdict.rows} == set(CASES)
    assert {row.devices for row in verdict.rows} == {1, 2, 3, 4, 8}


@pytest.mark.distributed
def test_float32_judges_the_first_step_and_reports_the_others(recipe):
    verdict = verify(recipe, (1, 2), cases=("base",), steps=3, dtype="float32")
    assert verdict.passes, verdict.sentence()
    assert verdict.limit == 1e-4
    row = verdict.rows[-1]
    assert 1e-9 < row.difference < 1e-4
    assert row.where.startswith(("gradient.", "step 1: "))
    assert row.later_difference is not None


HABITS = {
    "rank_local_normalizers": ("bn-all", r"gradient\.\S+ differs"),
    "broadcast_buffers": ("base", r"buffers\.\S+running_mean differs"),
    "seeds_of_ranks": ("base", r"gradient\.\S+ differs"),
    "local_batch_norm": ("bn-all", r"gradient\.\S+ differs"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", HABITS)
def test_every_habit_of_others_breaks_the_contract(name, recipe, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    habit = getattr(importlib.import_module("what_others_do"), name)
    case, fault = HABITS[name]
    verdict = verify(recipe, (1, 2), cases=(case,), steps=1, break_with=habit)
    assert [row.passes for row in verdict.rows] == [True, False]
    assert re.search(fault, verdict.rows[1].fault)
    assert verdict.rows[1].difference > 1e-6
    assert verdict.sentence().startswith(f"fail: 1 of 2 layouts; case {case} on 2 device(s): ")


@pytest.mark.distributed
def test_float32_fails_where_a_later_value_is_not_finite_and_not_for_other_detections(recipe):
    row = verify(recipe, (1, 2), cases=("base",), steps=2, dtype="float32", break_with=bring_a_nan_later).rows[1]
    assert "is not finite" in row.fault
    row = verify(recipe, (1, 2), cases=("base",), steps=2, dtype="float32", break_with=find_less_on_two).rows[1]
    assert row.passes
    assert row.of_kind["detections"] == math.inf


def bring_a_nan_later(trainer: Trainer, world: World) -> None:
    step = trainer.optimizer.step

    def step_and_break() -> None:
        step()
        trainer.model.box_head.fc1.weight.data[0, 0] = math.nan

    trainer.optimizer.step = step_and_break  # type: ignore[assignment, method-assign]


def find_less_on_two(trainer: Trainer, world: World) -> None:
    if world.size == 2:
        head = trainer.model.box_head
        head.recipe = replace(head.recipe, detections=3)


def stand_still(trainer: Trainer, world: World) -> None:
    trainer.optimizer.step = lambda: None  # type: ignore[assignment, method-assign]


def freeze_one_tensor(trainer: Trainer, world: World) -> None:
    weight, step = trainer.model.rpn.conv.weight, trainer.optimizer.step
    start = weight.detach().clone()

    def step_and_restore() -> None:
        step()
        weight.data.copy_(start)

    trainer.optimizer.step = step_and_restore  # type: ignore[assignment, method-assign]


def bring_a_nan(trainer: Trainer, world: World) -> None:
    trainer.model.box_head.fc1.weight.data[0, 0] = math.nan


def drift(trainer: Trainer, world: World) -> None:
    trainer.model.register_buffer("own", torch.tensor(world.rank))
    if world.is_first:
        return
    trainer.model.own = torch.tensor(7)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("habit", "fault"),
    [
        (stand_still, r"^weights\.\S+ did not move, nor did \d+ other trained tensor\(s\)$"),
        (freeze_one_tensor, r"^weights\.rpn\.conv\.weight did not move$"),
        (bring_a_nan, r"is not finite"),
    ],
)
def test_what_does_not_move_or_is_not_finite_fails_on_every_count(habit, fault, recipe):
    verdict = verify(recipe, (1, 2), cases=("base",), steps=1, break_with=habit)
    for row in verdict.rows:
        assert re.search(fault, row.fault)
    if habit is bring_a_nan:
        assert json.loads(json.dumps(verdict.as_dict(), allow_nan=False))["largest_relative_difference"] == "Infinity"


@pytest.mark.distributed
def test_a_learning_rate_of_zero_fails(recipe):
    still = replace(recipe, optimizer=replace(recipe.optimizer, base_lr=1e-300))
    verdict = verify(still, (1, 2), cases=("base",), steps=1)
    assert all("did not move" in row.fault for row in verdict.rows)


@pytest.mark.distributed
def test_ranks_that_hold_other_buffers_fail(recipe):
    row = verify(recipe, (1, 2), cases=("base",), steps=1, break_with=drift).rows[1]
    assert row.fault == "rank 1 holds other weights or buffers than rank 0"


def test_the_measure_is_the_largest_difference_over_the_largest_value():
    assert relative_difference(torch.tensor([2.0, -4.0]), torch.tensor([2.5, -4.0])) == 0.125
    assert relative_difference(torch.tensor([0.0]), torch.tensor([1e-6])) == pytest.approx(1.0)
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0
    for bad in (torch.tensor([math.nan]), torch.tensor([math.inf]), torch.zeros(2)):
        assert relative_difference(torch.zeros(1), bad) == math.inf
    assert relative_difference(torch.tensor([math.nan]), torch.tensor([math.nan])) == math.inf


def test_every_case_changes_the_recipe_or_the_layout_or_stops():
    recipe = load_recipe("verify")
    for name, case in CASES.items():
        is_other = case.change(recipe) != recipe or case.lane_width or case.stops
        assert is_other or name == "base"


@pytest.mark.parametrize("changes", [{"bn_size": 16}, {"bn_size": 0, "group_size": 16, "fpn.norm": "none"}])
def test_the_cases_of_agvm_make_two_groups_of_a_recipe_with_one(changes):
    recipe = load_recipe("verify", changes)
    assert recipe.groups_per_step == 1
    planned = trials(recipe, ("agvm", "agvm-adamw", "resume-agvm"), (1, 2), 4, None, Path("unused"))
    assert {run.recipe.groups_per_step for trial in planned for run in trial.runs} == {2}
    assert all(run.recipe.optimizer.agvm and run.recipe.schedule.warmup_steps == 1 for t in planned for run in t.runs)


def test_the_layouts_of_all_cases_cover_every_width_and_uneven_shares():
    recipe = load_recipe("verify")
    planned = trials(recipe, chosen_cases("all"), (1, 2, 3, 4, 8), 20, None, Path("unused"))
    layouts = [run.layout for trial in planned for run in trial.runs]
    assert {layout.lane_width for layout in layouts} == {1, 2, 3, 4, 8}
    assert {layout.rounds for layout in layouts} >= {1, 2, 3, 4, 8}
    assert any(layout.idle for layout in layouts)
    assert any(layout.group_size % layout.lane_width for layout in layouts)


def test_a_forced_width_leaves_the_first_count_its_own_and_is_refused_elsewhere(tmp_path):
    recipe = load_recipe("verify")
    planned = trials(recipe, ("base",), (1, 2, 4), 3, 2, tmp_path)
    assert [(trial.runs[0].ranks, trial.runs[0].lane_width) for trial in planned] == [(1, 1), (2, 2), (4, 2)]
    with pytest.raises(InputError, match="lane width 2 does not divide 3 devices"):
        trials(recipe, ("base",), (1, 3), 3, 2, tmp_path)


@pytest.mark.parametrize(
    ("devices", "options", "message"),
    [
        ((1, 17), {}, "17 devices for a mini-batch of 16 images"),
        ((2,), {}, "nothing to compare: base on 2 device"),
        ((1, 3), {"cases": ("lane-2",)}, "nothing to compare: lane-2 on 1, 3"),
        ((1, 1), {}, "name different counts"),
        ((1, 2), {"steps": 0}, "0 steps: it takes at least one"),
        ((1, 2), {"cases": ("resume",), "steps": 1}, "case resume stops half-way: ask for at least 2 steps"),
    ],
)
def test_what_cannot_be_verified_is_refused_before_any_work(devices, options, message, recipe):
    with pytest.raises(InputError, match=message):
        verify(recipe, devices, **options)


def test_under_torchrun_it_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="run it without torchrun"):
        verify(recipe, (1, 2))


def test_a_case_that_is_none_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"no case 'lane-3'.*there are all, short, base"):
        chosen_cases("base,lane-3")
