import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import Resize
from torchvision.transforms.v2 import functional as V

from megdet.data.draws import unit_interval
from megdet.data.plan import (
    TrainingPlan,
    canvas_of,
    evaluation_plan,
    resized,
)
from megdet.distributed.layout import choose_layout
from megdet.errors import InputError
from megdet.recipe import Data, Evaluation, Recipe, Schedule
from plans import make_plan, some_plans, some_sizes, steps_of


def test_a_canvas_is_rounded_to_the_named_edges_as_far_as_they_reach_and_to_the_multiple_beyond():
    data = Data(canvas_edges=(800, 1000, 1344))
    assert canvas_of((800, 1333), data) == (800, 1344)
    assert canvas_of((801, 20), data) == (1000, 800)
    assert canvas_of((1345, 1000), data) == (1376, 1000)
    assert canvas_of((801, 20), Data()) == (832, 32)


def test_named_edges_make_few_canvases_and_cost_padding_that_is_counted():
    few, many = (
        make_plan(200, batch_size=4, bn_size=2, data=Data(short_edges=(90,), max_long_edge=160, canvas_edges=edges))
        for edges in ((96, 160), ())
    )
    few_found, many_found = few.canvases(), many.canvases()
    assert set(few_found.counts) <= {(96, 96), (96, 160), (160, 96), (160, 160)}
    assert len(many_found.counts) > len(few_found.counts)
    assert few_found.counts.total() == many_found.counts.total() == 100
    groups = steps_of(few, 0, 50)
    pixels = sum(2 * group.canvas[0] * group.canvas[1] for group in groups)
    inside = sum(image.size[0] * image.size[1] for group in groups for image in group.images)
    assert few_found.padding == pytest.approx(1 - inside / pixels)
    assert 0 < many_found.padding < few_found.padding < 1


JITTERED = Data(short_edges=(60, 90), max_long_edge=130, scale_jitter=(0.5, 1.5), canvas_multiple=16)


@given(some_plans(), st.integers(1, 3))
def test_an_epoch_holds_every_image_once_even_where_a_window_spans_two(numbers, epochs):
    plan = make_plan(**numbers, data=JITTERED)
    # Whole windows hold the stream's next positions, so up to the end of the window that finishes `epochs` epochs every
    # image has come exactly once in each of them, and what else came belongs to later epochs.
    windows = math.ceil(epochs * plan.num_images / (plan.recipe.batch_size * plan.recipe.plan_window))
    steps = windows * plan.recipe.plan_window
    seen = Counter((image.epoch, image.index) for group in steps_of(plan, 0, steps) for image in group.images)
    assert set(seen.values()) == {1}
    assert seen.total() == steps * plan.recipe.batch_size
    assert {(e, i) for e in range(epochs) for i in range(plan.num_images)} <= set(seen)
    last, rest = divmod(seen.total(), plan.num_images)
    assert Counter(epoch for epoch, _ in seen) == Counter(
        dict.fromkeys(range(last), plan.num_images) | ({last: rest} if rest else {})
    )


def run_of(count: int, epochs: float, **recipe) -> TrainingPlan:
    """The plan of a run of so many epochs on images of 100 x 100 pixels."""
    schedule = Schedule(policy="step", epochs=epochs)
    return TrainingPlan(np.full((count, 2), 100), Recipe(**recipe, schedule=schedule))


def test_a_run_of_one_epoch_shows_all_of_100_images_at_16():
    plan = run_of(100, 1.0)
    assert plan.total_steps == 7
    seen = Counter(image.index for group in steps_of(plan, 0, 7) for image in group.images)
    assert set(seen) == set(range(100))
    assert seen.total() == 112, "12 images of the next epoch fill the last mini-batch"
    assert max(seen.values()) == 2


@pytest.mark.slow
def test_the_last_epoch_of_coco_at_256_shows_all_of_its_117266_images():
    plan = run_of(117_266, 11.0, batch_size=256, bn_size=32)
    assert plan.total_steps == 5039, "11 * 117266 / 256 = 5038.8"
    first = plan.epoch_end(10) - plan.recipe.plan_window  # a window may hold images of two epochs
    seen = [(i.epoch, i.index) for g in steps_of(plan, first, 5039) for i in g.images]
    assert sorted(index for epoch, index in seen if epoch == 10) == list(range(117_266))


@given(some_plans(), st.floats(0.1, 4) | st.integers(1, 4).map(float))
def test_a_run_shows_every_image_once_in_each_of_its_epochs_and_fills_its_last_step_from_the_next(numbers, epochs):
    plan = make_plan(**numbers, data=JITTERED, schedule=Schedule(policy="step", epochs=epochs))
    last, n = plan.total_steps, plan.num_images
    seen = Counter((image.epoch, image.index) for group in steps_of(plan, 0, last) for image in group.images)
    assert set(seen.values()) == {1}
    whole, rest = divmod(last * plan.recipe.batch_size, n)
    assert Counter(epoch for epoch, _ in seen) == Counter(
        dict.fromkeys(range(whole), n) | ({whole: rest} if rest else {})
    )
    assert 0 <= last * plan.recipe.batch_size - epochs * n < plan.recipe.batch_size + 1e-6


@given(some_plans(), st.integers(1, 3))
def test_the_plan_goes_on_behind_the_end_of_the_run_for_those_who_try_longer(numbers, epochs):
    plan = make_plan(**numbers, data=JITTERED, schedule=Schedule(policy="step", epochs=float(epochs)))
    last = plan.total_steps + 2 * plan.recipe.plan_window
    seen = Counter((image.epoch, image.index) for group in steps_of(plan, 0, last) for image in group.images)
    assert set(seen.values()) == {1}
    assert seen.total() == last * plan.recipe.batch_size
    assert all(seen[0, index] for index in range(plan.num_images))


@given(some_plans())
def test_every_step_has_its_groups_of_their_size_on_canvases_that_hold_them(numbers):
    plan = make_plan(**numbers, data=JITTERED)
    recipe = plan.recipe
    for step in range(2 * recipe.plan_window):
        groups = plan.groups(step)
        assert len(groups) == recipe.batch_size // recipe.images_per_group == recipe.groups_per_step
        assert plan.order_of(step).tolist() == [image.index for group in groups for image in group.images]
        for group in groups:
            assert len(group.images) == recipe.images_per_group
            for axis in (0, 1):
                largest = max(image.size[axis] for image in group.images)
                assert group.canvas[axis] % 16 == 0
                assert largest <= group.canvas[axis] < largest + 16


@given(some_plans(), st.integers(0, 40))
def test_a_step_computed_alone_is_the_step_computed_in_sequence(numbers, step):
    plan = make_plan(**numbers, data=JITTERED)
    alone = TrainingPlan(plan.sizes.copy(), plan.recipe).groups(step)
    for earlier in range(step):
        plan.groups(earlier)
    assert list(plan.groups(step)) == list(alone)
    assert list(plan.groups(0)) == list(TrainingPlan(plan.sizes, plan.recipe).groups(0))  # and backwards


@given(some_plans(), st.data())
def test_the_slices_of_any_layout_make_up_every_group(numbers, data):
    plan = make_plan(**numbers, data=JITTERED)
    recipe = plan.recipe
    world = data.draw(st.integers(1, recipe.batch_size))
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, world)
    groups = plan.groups(0)
    parts: dict[int, list] = {number: [] for number in range(len(groups))}
    for rank in range(world):
        for number in layout.groups_of(rank):
            parts[number] += groups[number].images[layout.share_of(rank)]
    assert [tuple(parts[number]) for number in range(len(groups))] == [group.images for group in groups]


@given(n=st.integers(1, 5000), batch=st.integers(1, 600), epochs=st.integers(0, 40))
def test_epoch_e_ends_at_step_ceil_of_e_n_over_b(n, batch, epochs):
    plan = TrainingPlan(np.full((max(n, batch), 2), 10), Recipe(batch_size=batch, bn_size=1))
    assert plan.epoch_end(epochs) == -(-epochs * plan.num_images // batch)
    assert plan.epochs_done(plan.epoch_end(epochs)) >= epochs - 1e-9


def test_images_of_like_aspect_ratio_meet_within_a_window():
    plan = make_plan(40, plan_window=5)  # the window is the whole epoch
    aspects = sorted(
        [plan.sizes[image.index, 1] / plan.sizes[image.index, 0] for image in group.images]
        for group in steps_of(plan, 0, 5)
    )
    for lower, higher in itertools.pairwise(aspects):
        assert max(lower) <= min(higher)
    order = [plan.sizes[group.images[0].index, 1] / plan.sizes[group.images[0].index, 0] for group in plan.groups(0)]
    every = [group.images for group in steps_of(plan, 0, 5)]
    assert every != sorted(every, key=lambda images: plan.sizes[images[0].index, 1] / plan.sizes[images[0].index, 0])
    assert len(order) == 2


def test_images_of_one_aspect_ratio_are_mixed_by_the_permutation():
    plan = TrainingPlan(np.full((24, 2), 64), Recipe(batch_size=8, bn_size=4, plan_window=3))
    assert {image.index for image in plan.groups(0)[0].images} != set(range(4))
    assert [i.index for g in steps_of(plan, 0, 3) for i in g.images] != list(range(24))


def test_an_image_has_another_seed_and_other_flips_in_every_epoch_but_the_same_in_every_run():
    plan = make_plan(24, data=Data(horizontal_flip=0.5, vertical_flip=0.5))
    images = {(i.epoch, i.index): i for g in steps_of(plan, 0, 6) for i in g.images}
    assert len({image.seed for image in images.values()}) == len(images) == 48
    changed = [images[0, index].flip_horizontal != images[1, index].flip_horizontal for index in range(24)]
    assert 4 <= sum(changed) <= 20
    assert any(image.flip_horizontal != image.flip_vertical for image in images.values())
    other = make_plan(24, seed=1)
    assert not {image.seed for image in images.values()} & {i.seed for g in steps_of(other, 0, 6) for i in g.images}


def test_the_seed_of_an_image_does_not_depend_on_batch_groups_or_window():
    first = {(i.epoch, i.index): i.seed for g in steps_of(make_plan(24), 0, 6) for i in g.images}
    other = make_plan(24, batch_size=12, bn_size=0, group_size=3, plan_window=2)
    assert first == {(i.epoch, i.index): i.seed for g in steps_of(other, 0, 4) for i in g.images}


@pytest.mark.parametrize("probability", [0.0, 1.0, 0.25])
def test_images_are_flipped_as_often_as_the_recipe_says(probability):
    plan = make_plan(400, data=Data(horizontal_flip=probability, vertical_flip=1 - probability))
    images = [i for g in steps_of(plan, 0, 200) for i in g.images]
    assert np.mean([i.flip_horizontal for i in images]) == pytest.approx(probability, abs=0.04)
    assert np.mean([i.flip_vertical for i in images]) == pytest.approx(1 - probability, abs=0.04)


def test_the_scale_is_drawn_once_for_a_group():
    data = Data(short_edges=(30, 60, 90), max_long_edge=10**6, scale_jitter=(0.5, 2.0), canvas_multiple=1)
    plan = make_plan(300, data=data)
    drawn = []
    for group in steps_of(plan, 0, 100):
        short = {min(image.size) for image in group.images}
        assert len(short) == 1
        drawn += short
    assert min(drawn) < 20
    assert max(drawn) > 150
    assert len(set(drawn)) > 50


def test_a_fixed_scale_draws_only_the_short_edges():
    plan = make_plan(100, data=Data(short_edges=(30, 60), max_long_edge=10**6))
    assert {min(i.size) for g in steps_of(plan, 0, 30) for i in g.images} == {30, 60}


def test_resizing_by_hand():
    assert resized(480, 640, 800, 1333) == (800, 1067)  # 640 * 800 / 480 = 1066.7
    assert resized(480, 1280, 800, 1333) == (500, 1333)  # the longer edge decides: 480 * 1333 / 1280 = 499.9
    assert resized(2, 3000, 800, 1333) == (1, 1333)  # 0.9 of a pixel
    assert resized(1, 3000, 800, 1000) == (1, 1000)  # never nothing


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(16, 1200), st.integers(0, 900))
def test_resizing_is_torchvisions_rule_up_to_rounding(height, width, short_edge, more):
    longest = short_edge + 1 + more
    expected = V._geometry._compute_resized_output_size((height, width), [short_edge], max_size=longest)
    found = resized(height, width, short_edge, longest)
    assert all(abs(a - b) <= 1 or a == 1 for a, b in zip(found, expected, strict=True))
    assert max(found) <= longest


def test_resizing_has_the_size_of_torchvisions_transform_where_nothing_is_rounded():
    image = V.to_image(np.zeros((30, 60, 3), np.uint8))
    assert Resize(45, max_size=200)(image).shape[1:] == resized(30, 60, 45, 200) == (45, 90)
    assert Resize(45, max_size=80)(image).shape[1:] == resized(30, 60, 45, 80) == (40, 80)


def test_fewer_images_than_a_mini_batch_are_refused():
    TrainingPlan(some_sizes(8), Recipe(batch_size=8, bn_size=4))
    with pytest.raises(InputError, match="7 images to train on are not enough for one mini-batch of 8: lower batch_si"):
        TrainingPlan(some_sizes(7), Recipe(batch_size=8, bn_size=4))


def evaluated(batch: int) -> Recipe:
    return Recipe(data=Data(short_edges=(30, 60), max_long_edge=100), evaluation=Evaluation(batch_size=batch))


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 3))
def test_the_evaluation_plan_has_every_image_once_unflipped_at_the_last_short_edge_on_a_canvas_of_its_own(
    count, batch, seed
):
    recipe = replace(evaluated(batch), seed=seed)
    sizes = some_sizes(count)
    groups = evaluation_plan(sizes, recipe)
    assert sorted(image.index for group in groups for image in group.images) == list(range(count))
    for group in groups:
        assert 1 <= len(group.images) <= batch
        assert [image.index for image in group.images] == sorted(image.index for image in group.images)
        for image in group.images:
            assert image.size == resized(*sizes[image.index].tolist(), 60, 100)
            assert group.canvas == canvas_of(image.size, recipe.data)
            assert not image.flip_horizontal
            assert not image.flip_vertical
    canvases = Counter(group.canvas for group in groups for _ in group.images)
    assert [group.canvas for group in groups] == sorted(group.canvas for group in groups)
    assert len(groups) == sum(-(-images // batch) for images in canvases.values()), "none is smaller than it must be"


def test_an_image_has_the_same_canvas_in_evaluation_whatever_other_images_there_are():
    sizes = some_sizes(40)

    def canvases(chosen: np.ndarray) -> dict[int, tuple[int, int]]:
        return {int(chosen[i.index]): g.canvas for g in evaluation_plan(sizes[chosen], evaluated(4)) for i in g.images}

    every = canvases(np.arange(40))
    assert len(set(every.values())) > 2
    for chosen in (np.arange(0, 40, 3), np.arange(39, -1, -1), np.array([7])):
        assert canvases(chosen).items() <= every.items()


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 20))
def test_hashed_fractions_lie_in_the_unit_interval(seed, purpose):
    assert 0 <= unit_interval(seed, purpose) < 1


def test_hashed_fractions_are_uniform_and_purposes_independent():
    one = np.array([unit_interval(seed, 1) for seed in range(20000)])
    two = np.array([unit_interval(seed, 2) for seed in range(20000)])
    assert np.histogram(one, 10, (0, 1))[0] == pytest.approx(np.full(10, 2000), abs=200)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03


def test_torchvisions_sizes_are_cut_down_and_reach_every_place_of_the_plan():
    assert resized(480, 640, 800, 1333, "torchvision") == (800, 1066)  # 1066.7
    assert resized(2, 3000, 800, 1333, "torchvision") == (1, 1333)  # 0.9 of a pixel, never nothing
    recipe = Recipe(batch_size=2, bn_size=2, data=Data(resize="torchvision"))
    sizes = np.array([[480, 640]] * 4)
    groups = [*TrainingPlan(sizes, recipe).groups(0), *evaluation_plan(sizes, recipe)]
    assert {(image.size, image.resize) for group in groups for image in group.images} == {((800, 1066), "torchvision")}
    assert TrainingPlan(sizes, recipe).smallest_canvas()[1] == (800, 1088)
