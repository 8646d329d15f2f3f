"""The largest micro-batch is tried before the first step, and what does not fit is made smaller without a trace."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megdet.data import plan as plan_module
from megdet.data.plan import TrainingPlan
from megdet.distributed.layout import recipe_layout
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.training import dry_run
from megdet.training.dry_run import MemoryTrial, largest_batch
from megdet.training.run import RunOptions, open_run
from small_runs import ALONE, furthest, make, small_recipe, state_of, train_set, write_small_sets


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    return small_recipe(write_small_sets(tmp_path_factory.mktemp("dry")))


@pytest.fixture
def needed() -> Iterator[None]:
    """As on a machine with little memory."""
    with mock.patch.object(MemoryTrial, "_is_needed", return_value=True):
        yield


def trial_of(recipe: Recipe) -> MemoryTrial:
    dataset = train_set(recipe)
    return MemoryTrial(make(recipe), TrainingPlan(dataset.sizes, recipe), dataset, ALONE)


def after(recipe: Recipe, options: RunOptions | None = None, world: World = ALONE) -> Any:
    with open_run(recipe, world, options or RunOptions(workers=0)) as run:
        for _ in run.steps(0, 2):
            pass
        return state_of(run.trainer), run.layout, run.position.warnings


def test_a_trial_leaves_no_trace(recipe, needed):
    tried = after(recipe)
    with mock.patch.object(MemoryTrial, "_is_needed", return_value=False):
        plain = after(recipe)
    assert all(torch.equal(tensor, tried[0][name]) for name, tensor in plain[0].items())
    assert tried[1:] == plain[1:] == (plain[1], ())


def test_a_machine_with_much_memory_tries_nothing_and_one_with_little_does(recipe):
    for free, times in ((1 << 34, 0), (None, 0), (1 << 20, 1)):
        with (
            mock.patch.object(dry_run, "free_bytes", return_value=free),
            mock.patch.object(MemoryTrial, "_fits", return_value=0) as fits,
        ):
            after(recipe)
        assert fits.call_count == times


def test_a_trial_has_the_largest_canvas_of_the_plan_and_the_most_boxes_of_an_image(recipe):
    masked = replace(train_set(recipe, with_masks=True))
    batch = largest_batch(masked, 3, (64, 96), recipe.data)
    most = int(masked.annotations.counts.max())
    assert batch.pixels.shape == (3, 3, 64, 96)
    assert (batch.targets.is_box.sum(1) == most).all()
    assert batch.targets.masks is not None
    twice = largest_batch(masked, 3, (64, 96), replace(recipe.data, copy_paste=0.5, resize="torchvision"))
    assert (twice.targets.is_box.sum(1) == 2 * most).all()
    assert twice.pixels.dtype == torch.float32
    fivefold = largest_batch(masked, 3, (64, 96), replace(recipe.data, copy_paste=0.5, mosaic=0.5))
    assert (fivefold.targets.is_box.sum(1) == 5 * most).all()
    canvases: list[Any] = []
    with (
        mock.patch.object(MemoryTrial, "_is_needed", return_value=True),
        mock.patch.object(MemoryTrial, "_fits", lambda _, images, canvas: canvases.append((images, canvas)) or 0),
    ):
        after(recipe)
    plan = TrainingPlan(train_set(recipe).sizes, recipe)
    groups = [group for step in range(plan.total_steps) for group in plan.groups(step)]
    assert canvases == [(4, max((g.canvas for g in groups), key=lambda own: own[0] * own[1]))]


def test_the_largest_canvas_of_a_run_may_come_after_its_first_epoch(recipe):
    recipe = replace(
        recipe,
        data=replace(recipe.data, scale_jitter=(0.5, 2.0)),
        schedule=replace(recipe.schedule, epochs=20.0),
    )
    plan = TrainingPlan(train_set(recipe).sizes, recipe)
    areas = [[h * w for g in plan.groups(step) for h, w in [g.canvas]] for step in range(plan.total_steps)]
    first, whole = max(map(max, areas[: plan.epoch_end(1)])), max(map(max, areas))
    height, width = plan.largest_canvas()
    assert height * width == whole > first
    with mock.patch.object(plan_module, "MOST_LOOKED_AT", 0):  # a long run: at least one epoch
        height, width = plan.largest_canvas()
    assert height * width == first


def test_the_largest_canvas_is_found_without_drawing_images_and_no_further_than_the_largest_possible(recipe):
    small = replace(recipe, data=replace(recipe.data, scale_jitter=(0.5, 2.0)))
    plan = TrainingPlan(train_set(recipe).sizes, small)
    with mock.patch.object(TrainingPlan, "_make_groups", side_effect=AssertionError("it takes seconds")):
        canvas = plan.largest_canvas()
    assert all(own <= most for own, most in zip(canvas, plan.canvas_bound(), strict=True))
    same = TrainingPlan(np.full((64, 2), 64), replace(recipe, schedule=replace(recipe.schedule, epochs=50.0)))
    with mock.patch.object(same, "_drawn", wraps=same._drawn) as drawn:
        assert same.largest_canvas() == same.canvas_bound()
    assert drawn.call_count == 1 < same.total_steps


def test_where_nothing_fits_the_run_is_refused_before_its_first_step(recipe, needed):
    with (
        mock.patch.object(MemoryTrial, "_fits_here", return_value=None),
        pytest.raises(InputError, match=r"a micro-batch of 4 images on a canvas of \d+ x \d+ pixels does not fit cpu"),
    ):
        after(recipe)


def test_a_micro_batch_that_fits_in_pieces_only_is_recomputed_and_said_so(recipe, needed):
    plain, layout, _ = after(recipe)
    with mock.patch.object(MemoryTrial, "_fits_here", return_value=1):
        pieces, same_layout, (said,) = after(recipe)
    assert layout == same_layout == recipe_layout(recipe, 1)
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in plain.items())
    assert said.endswith("does not fit cpu: recompute block where micro-batches are large; the result is the same")


def in_two_ranks(world: World, recipe: Recipe, most: int) -> Any:
    with (
        mock.patch.object(MemoryTrial, "_is_needed", return_value=world.rank == 1),
        mock.patch.object(MemoryTrial, "_fits_here", lambda _, images, __: 0 if images <= most else None),
    ):
        return after(recipe, world=world)


@pytest.mark.distributed
def test_wider_lanes_carry_what_one_rank_cannot(recipe):
    alone, _, _ = after(recipe)
    for state, layout, (said,) in run_in_ranks(in_two_ranks, 2, recipe, 2):
        assert layout.lane_width == 2
        assert "lanes of 2 instead of 1" in said
        assert furthest(alone, state)[0] < 1e-9
