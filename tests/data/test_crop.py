"""Large-scale jitter in the plan: the size of a crop belongs to the group, its place to the image."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from megdet.data.plan import (
    TrainingPlan,
    evaluation_plan,
    training_size,
)
from megdet.recipe import Data, Recipe
from plans import make_plan, some_plans, some_sizes, steps_of

CROPPED = Data(crop=(96, 128), scale_jitter=(0.1, 2.0), scale_law="factor", canvas_multiple=16, short_edges=(7, 900))


def test_an_image_fits_the_crop_at_factor_1_and_is_cut_where_it_is_larger_by_hand():
    data = replace(CROPPED, scale_jitter=(1.5, 1.5))
    # 100 x 60 fits 96 x 128 at 0.96: 96 x 57.6; times 1.5: 144 x 86.4
    assert training_size(100, 60, 7, 1.5, data) == (144, 86)
    plan = TrainingPlan(np.array([[100, 60]] * 8), Recipe(batch_size=8, bn_size=4, data=data))
    for group in plan.groups(0):
        assert group.canvas == (96, 96)
        for image in group.images:
            assert image.size == (96, 86)
            assert image.crop is not None
            assert image.crop.whole == image.resized == (144, 86)
            assert image.crop.corner[1] == 0
    corners = {image.crop.corner[0] for step in range(20) for group in plan.groups(step) for image in group.images}
    assert min(corners) < 8
    assert 40 < max(corners) <= 144 - 96


def test_an_image_that_fits_is_not_cut():
    data = replace(CROPPED, scale_jitter=(0.5, 0.5))
    plan = TrainingPlan(np.array([[100, 60]] * 8), Recipe(batch_size=8, bn_size=4, data=data))
    assert {(i.size, i.resized, i.crop) for g in plan.groups(0) for i in g.images} == {((48, 29), (48, 29), None)}
    assert plan.smallest_canvas()[1] == (48, 32)


@given(some_plans())
def test_a_crop_lies_in_its_image_and_its_size_is_drawn_by_group(numbers):
    plan = make_plan(**numbers, data=CROPPED)
    for group in steps_of(plan, 0, 2 * plan.recipe.plan_window):
        factors = []
        for image in group.images:
            whole, original = image.resized, plan.sizes[image.index]
            assert image.size == (min(whole[0], 96), min(whole[1], 128))
            top, left = image.crop.corner if image.crop else (0, 0)
            assert 0 <= top <= whole[0] - image.size[0]
            assert 0 <= left <= whole[1] - image.size[1]
            fit = min(96 / original[0], 128 / original[1])
            edge = int(np.argmax(original))
            factors.append((whole[edge] - 0.5, whole[edge] + 0.5) / (fit * original[edge]))
        lows, highs = np.array(factors).T
        assert max(lows) <= min(highs) + 1e-9, "one factor explains every size of the group"
        assert max(group.canvas) <= 128


def test_the_place_of_a_crop_is_drawn_by_the_image_and_changes_every_epoch():
    data = replace(CROPPED, scale_jitter=(2.0, 2.0))
    sizes = np.full((24, 2), 100)

    def places(**recipe) -> dict[tuple[int, int], tuple[int, int]]:
        plan = TrainingPlan(sizes, Recipe(**({"batch_size": 8, "bn_size": 4, "plan_window": 3} | recipe), data=data))
        images = [i for g in steps_of(plan, 0, 48 // plan.recipe.batch_size) for i in g.images]
        return {(i.epoch, i.index): i.crop.corner for i in images}

    first = places()
    assert first == places(batch_size=12, bn_size=0, group_size=3, plan_window=2)
    tops, lefts = np.array(list(first.values())).T
    assert len(set(zip(tops.tolist(), lefts.tolist(), strict=True))) > 40
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.4
    assert sum(first[0, index] != first[1, index] for index in range(24)) > 20


def test_named_edges_make_the_canvas_of_crops_fixed():
    plan = make_plan(40, data=replace(CROPPED, canvas_edges=(128,)))
    assert set(plan.canvases().counts) == {(128, 128)}


@pytest.mark.parametrize(("law", "below_middle"), [("factor", 0.5), ("logarithm", math.log(10.5) / math.log(20))])
def test_the_factor_or_its_logarithm_is_uniform(law, below_middle):
    data = Data(short_edges=(1000,), max_long_edge=10**6, scale_jitter=(0.1, 2.0), scale_law=law)
    plan = make_plan(400, data=data, batch_size=8, bn_size=1)
    drawn = [min(group.images[0].size) / 1000 for group in steps_of(plan, 0, 100)]
    assert len(drawn) == 800
    assert np.mean(np.array(drawn) < 1.05) == pytest.approx(below_middle, abs=0.06)


def test_a_crop_does_not_touch_the_evaluation():
    sizes = some_sizes(9)
    plain, cropped = (
        evaluation_plan(sizes, Recipe(data=data))
        for data in (Data(short_edges=(7, 900)), replace(CROPPED, canvas_multiple=32))
    )
    assert plain == cropped
