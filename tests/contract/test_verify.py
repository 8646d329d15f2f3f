"""The contract's own check: it passes where the contract holds, and fails for everything that breaks it."""

import importlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megdet.contract.cases import SHORT, cases_of, chosen_cases
from megdet.contract.run import Trained
from megdet.contract.trials import LeftOut, left_out, trials, write_weights
from megdet.contract.verify import STEPS, Verdict, _fault, _joined, of_detections, relative_difference, verify
from megdet.data.coco import training_set
from megdet.data.plan import TrainingPlan, canvas_of
from megdet.data.rle import encode_mask
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe
from megdet.training.datasets import load_datasets
from megdet.training.trainer import Trainer

EXAMPLES = Path(__file__).parents[2] / "examples"


def check(verdict: Verdict) -> None:
    assert verdict.passes, verdict.sentence()
    others = [row for row in verdict.rows if row.compared_with == "another layout"]
    assert verdict.sentence().startswith(f"pass: {len(others)} runs compared with another layout")
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
    assert [key for key, row in rows.items() if row.compared_with == "nothing"] == [
        ("base", None, 1),
        ("bn-all", None, 1),
        ("agvm", None, 1),
        ("new-process", None, 3),
    ]
    assert [key for key, row in rows.items() if row.compared_with == "same layout"] == [("new-process", 3, 3)]
    assert verdict.count("another layout") == len(rows) - 5 == 6
    assert LeftOut("bn-all", (2,), "to save time") in verdict.left_out
    assert LeftOut("lane-2", (1, 2, 3), "not asked for") in verdict.left_out


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["retinanet", "heads"])
def test_a_detector_of_another_kind_passes_as_a_case(recipe, case):
    verdict = verify(recipe, (1, 3), cases=(case,), steps=2)
    check(verdict)
    assert [(row.devices, row.compared_with) for row in verdict.rows] == [(1, "nothing"), (3, "another layout")]


@pytest.mark.slow
@pytest.mark.distributed
def test_retinanet_passes_in_every_layout_and_with_every_norm(recipe):
    small = replace(recipe, model=load_recipe("verify-retinanet").model)
    verdict = verify(
        small, (1, 2, 3), cases=("base", "head-norms", "bn-all", "lane-2", "recompute-stage", "resume"), steps=4
    )
    check(verdict)


@pytest.mark.slow
@pytest.mark.distributed
def test_every_case_passes_on_all_device_counts(recipe):
    verdict = verify(recipe, cases=tuple(cases_of(recipe)))
    check(verdict)
    assert {row.case for row in verdict.rows} == set(cases_of(recipe))
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
    "own_canvas": ("bn-all", r"gradient\.\S+ differs"),
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
    assert verdict.sentence().startswith(f"fail: 1 of 2 runs; case {case} on 2 device(s): ")


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
    for name, case in cases_of(recipe).items():
        is_other = case.change(recipe) != recipe or case.lane_width or case.stops or case.has_weights
        assert is_other or name == "base"


def test_the_case_of_weights_has_a_table_with_every_image_and_leaves_one_out(recipe, tmp_path):
    plain = load_datasets(recipe, World(0, 1, torch.device("cpu"))).train
    write_weights(tmp_path, plain.file_names, recipe.batch_size)
    (run, *_) = trials(recipe, ("weights",), (1, 2), 4, None, tmp_path)[0].runs
    weighted = training_set(run.recipe.data, masks="none")
    assert weighted.file_names == plain.file_names[1:]
    assert sorted(set(weighted.weights.tolist())) == [0.5, 1, 1.5, 2, 2.5, 3]
    write_weights(tmp_path, plain.file_names, len(plain))
    assert training_set(run.recipe.data, masks="none").num_weightless == 0


@pytest.mark.parametrize("changes", [{"bn_size": 16}, {"bn_size": 0, "group_size": 16, "model.fpn.norm": "none"}])
def test_the_cases_of_agvm_make_two_groups_of_a_recipe_with_one(changes):
    recipe = load_recipe("verify", changes)
    assert recipe.groups_per_step == 1
    planned = trials(recipe, ("agvm", "agvm-adamw", "resume-agvm"), (1, 2), 4, None, Path("unused"))
    assert {run.recipe.groups_per_step for trial in planned for run in trial.runs} == {2}
    assert all(run.recipe.optimizer.agvm and run.recipe.schedule.warmup_steps == 1 for t in planned for run in t.runs)


def test_the_layouts_of_all_cases_cover_every_width_and_uneven_shares():
    recipe = load_recipe("verify")
    planned = trials(recipe, chosen_cases("all", recipe), (1, 2, 3, 4, 8), 20, None, Path("unused"))
    layouts = [run.layout for trial in planned for run in trial.runs]
    assert {layout.lane_width for layout in layouts} == {1, 2, 3, 4, 8}
    assert {layout.rounds for layout in layouts} >= {1, 2, 3, 4, 8}
    assert any(layout.idle for layout in layouts)
    assert any(layout.group_size % layout.lane_width for layout in layouts)


def test_only_what_is_compared_with_another_layout_is_counted_as_that():
    names = ("base", "recompute-block", "lane-1", "lane-2", "new-process")
    planned = trials(load_recipe("verify"), names, (1, 2, 4, 8), 4, None, Path("unused"))
    others = [(trial.case, trial.runs[-1].ranks) for trial in planned if trial.has_other_layout]
    assert others == [("base", 2), ("base", 4), ("base", 8), ("lane-1", 8), ("lane-2", 2), ("lane-2", 4)]
    same = [(t.case, t.runs[-1].ranks) for t in planned if t.runs != t.reference and not t.has_other_layout]
    assert same == [("recompute-block", 1), ("new-process", 4)]  # one device against itself, and the same again
    keys = [(trial.runs, trial.reference) for trial in planned]
    assert len(set(keys)) == len(keys), "nothing is counted twice"


def test_what_is_left_out_is_told_with_its_reason():
    names = ("base", "bn-all", "lane-1", "lane-2", "recompute-stage")
    verified = load_recipe("verify")
    planned = trials(verified, names, (1, 2, 3, 4, 8), 4, None, Path("unused"))
    found = left_out(verified, planned, names, (1, 2, 3, 4, 8))
    told = {(own.case, own.why): own.devices for own in found if own.case in names}
    assert told == {
        ("bn-all", "to save time"): (2, 4),
        ("lane-1", "the same as case base there"): (1, 2, 3, 4),
        ("lane-2", "2 does not divide them"): (1, 3),
        ("lane-2", "the same as case base there"): (8,),
        ("recompute-stage", "2 does not divide them"): (1, 3),
    }
    assert {own.case for own in found if own.why == "not asked for"} == set(cases_of(verified)) - set(names)


def test_the_images_of_the_packaged_recipe_have_several_canvases_and_an_epoch_ends_within_a_mini_batch(recipe):
    dataset = load_datasets(recipe, World(0, 1, torch.device("cpu"))).train
    plan = TrainingPlan(dataset.sizes, recipe)
    groups = [group for step in range(STEPS) for group in plan.groups(step)]
    assert len({group.canvas for group in groups}) >= 3
    padded = [group for group in groups if group.canvas != canvas_of(group.images[0].size, recipe.data)]
    assert padded, "no image fills the canvas of its group"
    assert [len({image.epoch for group in plan.groups(step) for image in group.images}) for step in range(3)].count(2)
    assert plan.total_steps >= STEPS


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
        ((1, 3), {"cases": ("lane-2",)}, "nothing to compare: lane-2 on 1, 3 .*a multiple of 2, as in --devices 1,2"),
        (
            (1,),
            {"cases": ("lane-1",)},
            "nothing to compare: lane-1 on 1 .*at least two device counts, as in --devices 1,2",
        ),
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
        chosen_cases("base,lane-3", Recipe())


def test_a_pixel_that_two_masks_do_not_share_is_a_difference():
    pixels = np.zeros((4, 5), bool)
    pixels[1, 2] = True
    found = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 4], "score": 0.5}
    mask, none = encode_mask(pixels, 0, 0, (4, 5)), encode_mask(np.zeros((0, 0), bool), 0, 0, (4, 5))
    same = dict(of_detections([{**found, "segmentation": mask}], [{**found, "segmentation": dict(mask)}]))
    assert same == {"bbox": 0, "score": 0, "segmentation": 0}
    other = dict(of_detections([{**found, "segmentation": mask}], [{**found, "segmentation": none}]))
    assert other == {"bbox": 0, "score": 0, "segmentation": 1 / 20}
    missing = dict(of_detections([{**found, "segmentation": mask}], [found]))
    assert missing["segmentation"] == math.inf


def half(rates, unmoved):
    return Trained({}, [], rates, {}, [], unmoved, [])


def test_a_tensor_that_moves_in_one_half_of_a_stopped_run_has_moved():
    joined = _joined([half([0.0], ["a", "b", "frozen"]), half([0.1], ["frozen"])])
    assert (joined.unmoved, joined.rates) == (["frozen"], [0.0, 0.1])
    assert _fault(joined, [], 0.0) == "frozen did not move"
    assert _joined([half([0.1], []), half([0.0], ["a"])]).unmoved == []
    assert "learning rate is 0 in every step" in _fault(_joined([half([0.0], ["a"])] * 2), [], 0.0)
