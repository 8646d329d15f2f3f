"""Rare classes come more often, in an order that is a pure function of the recipe and the data."""

import itertools
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data_factories import box_row, image_row, write_set
from megdet.data.coco import load_coco
from megdet.data.plan import TrainingPlan
from megdet.data.sampling.frequencies import training_plan
from megdet.data.sampling.repeats import repeat_factors
from megdet.data.unreadable import stand_in
from megdet.recipe import Data, Recipe, Schedule
from plans import steps_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """16 images with class 1; the first four have class 2 too, the first one class 3 as well; a crowd of class 4."""
    folder = tmp_path_factory.mktemp("rare")
    classes = [[1, 2, 3, 3]] + [[1, 2]] * 3 + [[1]] * 12
    boxes = [(image, label) for image, own in enumerate(classes) for label in own]
    document = {
        "images": [image_row(number, f"{number}.png") for number in range(16)],
        "annotations": [box_row(n, image, label, [1, 2, 10, 10]) for n, (image, label) in enumerate(boxes)],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, 6)],
    }
    document["annotations"].append(box_row(99, 15, 4, [0, 0, 40, 30], iscrowd=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return load_coco(*write_set(folder, document), keep_empty=False)


def recipe_with(threshold, **more):
    own = {"batch_size": 8, "bn_size": 4, "plan_window": 3, "schedule": Schedule(policy="cosine", epochs=6.0)} | more
    return Recipe(**own, data=Data(repeat_threshold=threshold))


def test_factors_are_those_of_lvis_by_hand(dataset):
    # class 2 is in 4 of 16 images: sqrt(0.5 / 0.25); class 3 in one: sqrt(0.5 * 16); crowds do not count
    wanted = [np.sqrt(8)] + [np.sqrt(2)] * 3 + [1] * 12
    np.testing.assert_allclose(repeat_factors(dataset, 0.5), wanted)
    np.testing.assert_allclose(repeat_factors(dataset, 1 / 16), 1)


def test_an_epoch_keeps_its_length_and_each_image_comes_as_often_as_its_factor_says(dataset):
    plan, factors = training_plan(dataset, recipe_with(1.0)), repeat_factors(dataset, 1.0)
    wanted = 16 * factors / factors.sum()
    counts = np.array([np.bincount(plan.order(epoch), minlength=16) for epoch in range(400)])
    assert (counts.sum(axis=1) == 16).all()
    assert (np.floor(wanted) <= counts).all()
    assert (counts <= np.ceil(wanted)).all()
    # a count is one of two whole numbers: the error of the mean of 400 is 0.5 / 20 at most
    np.testing.assert_allclose(counts.mean(axis=0), wanted, atol=4 * 0.025)


def test_no_image_of_a_run_has_the_randomness_of_another(dataset):
    plan = training_plan(dataset, recipe_with(1.0))
    images = [image for group in steps_of(plan, 0, plan.total_steps) for image in group.images]
    assert len(images) == 6 * 16
    assert len({image.seed for image in images}) == len(images)
    repeated = Counter((image.epoch, image.index) for image in images)
    assert max(repeated.values()) == 3  # 16 * 4 / (4 + 3 * 2 + 12) = 2.9 times


def test_repeats_are_equal_in_every_process_and_from_every_start(dataset):
    plan = training_plan(dataset, recipe_with(0.5))
    other = pickle.loads(pickle.dumps(plan))
    for step in (7, 3, 11, 0):  # in any order, as a resumed run asks for them
        assert list(other.groups(step)) == list(plan.groups(step))
        seen = [image.index for group in plan.groups(step) for image in group.images]
        assert plan.order_of(step).tolist() == seen
    assert plan.order(0).tolist() != training_plan(dataset, recipe_with(0.5, seed=1)).order(0).tolist()


def test_without_a_rare_class_or_a_threshold_every_image_comes_once(dataset):
    plain = TrainingPlan(dataset.sizes, recipe_with(0.0))
    alike = training_plan(dataset, recipe_with(1 / 16))
    for epoch in range(3):
        assert sorted(plain.order(epoch).tolist()) == sorted(alike.order(epoch).tolist()) == list(range(16))
    assert plain.order(0) is plain.permutation(0)
    for threshold, repeats in ((0.5, None), (0.0, np.ones(16))):
        with pytest.raises(ValueError, match="needs frequencies"):
            TrainingPlan(dataset.sizes, recipe_with(threshold), repeats)


def test_lost_images_that_follow_each_other_lead_to_a_sound_one(dataset):
    plan = training_plan(dataset, recipe_with(1.0))
    image = plan.groups(0)[0].images[0]
    chain = itertools.accumulate(range(15), lambda own, _: stand_in(plan, own, (64, 64)), initial=image)
    assert sorted(own.index for own in chain) == list(range(16))
    lost = replace(image, seed=image.seed + 1)
    assert stand_in(plan, lost, (64, 64)).seed != stand_in(plan, image, (64, 64)).seed
