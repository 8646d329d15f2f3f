"""Weights of images: how often each comes, and what a table of them may not say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_factories import box_row, image_row, write_set
from megdet.data.coco import CocoDataset, training_set
from megdet.data.sampling.frequencies import frequencies, training_plan
from megdet.data.sampling.repeats import repeat_factors
from megdet.data.shared import once_a_host
from megdet.data.unreadable import stand_in
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.planning.describe import describe
from megdet.recipe import Data, Recipe, Schedule
from megdet.training.datasets import fingerprint
from plans import steps_of


@pytest.fixture
def data(tmp_path, cache_folder):
    """Ten images: 8 and 9 have class 2 as well, and one more, 10, has no box."""
    boxes = [(image, 1) for image in range(10)] + [(8, 2), (9, 2)]
    document = {
        "images": [image_row(number, f"a {number}.png") for number in range(11)],
        "annotations": [box_row(n, image, label, [1, 2, 10, 10]) for n, (image, label) in enumerate(boxes)],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }
    file, images = write_set(tmp_path, document)
    table = str(tmp_path / "weights.csv")
    return Data(train_annotations=str(file), train_images=str(images), image_weights=table)


def read(data, lines) -> CocoDataset:
    Path(data.image_weights).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return training_set(data, masks="none")


def weights(*own, first=0):
    return ["file_name,weight", *(f"a {first + place}.png,{weight}" for place, weight in enumerate(own))]


def recipe_with(data, **more):
    return Recipe(batch_size=4, bn_size=2, plan_window=3, data=data, schedule=Schedule("cosine", 6.0), **more)


def test_an_image_comes_in_proportion_to_its_weight_and_a_weight_of_0_leaves_it_out(data):
    dataset = read(data, weights(0, 3, 1, 1, 1, 1, 0.5, 0.5, 1, 0))
    assert dataset.num_weightless == 2
    assert dataset.file_names == tuple(f"a {number}.png" for number in range(1, 9))
    plan, wanted = training_plan(dataset, recipe_with(data)), np.array([3, 1, 1, 1, 1, 0.5, 0.5, 1]) * 8 / 9
    assert plan.num_images == 8
    counts = np.array([np.bincount(plan.order(epoch), minlength=8) for epoch in range(400)])
    assert (counts.sum(axis=1) == 8).all()
    assert (np.floor(wanted) <= counts).all()
    assert (counts <= np.ceil(wanted)).all()
    # a count is one of two whole numbers: the error of the mean of 400 is 0.5 / 20 at most
    np.testing.assert_allclose(counts.mean(axis=0), wanted, atol=4 * 0.025)


def test_an_image_that_is_left_out_is_never_opened_and_never_a_stand_in(data):
    (Path(data.train_images) / "a 3.png").unlink()
    dataset = read(data, weights(1, 1, 1, 0, 1, 1, 1, 1, 1, 1))
    plan = training_plan(dataset, recipe_with(data))
    seen = {image.index for group in steps_of(plan, 0, plan.total_steps) for image in group.images}
    seen |= {stand_in(plan, image, (64, 64)).index for image in plan.groups(0)[0].images}
    assert seen == set(range(9))
    with pytest.raises(InputError, match="a 3"):
        read(data, weights(*[1] * 10))


def test_weights_are_relative_and_multiplied_with_the_factors_of_rare_classes(data):
    own = [1, 2, 1, 1, 1, 1, 1, 1, 3, 0.5]
    dataset, doubled = read(data, weights(*own)), read(data, weights(*(2 * weight for weight in own)))
    for repeat_threshold in (0.0, 0.8):
        recipe = recipe_with(replace(data, repeat_threshold=repeat_threshold))
        ours, theirs = training_plan(dataset, recipe), training_plan(doubled, recipe)
        assert all(ours.order(epoch).tolist() == theirs.order(epoch).tolist() for epoch in range(5))
    # class 2 is in two of ten images: sqrt(0.8 / 0.2)
    assert frequencies(dataset, recipe.data).tolist() == [1, 2, 1, 1, 1, 1, 1, 1, 6, 1]
    assert repeat_factors(dataset, 0.8).tolist() == [*[1] * 8, 2, 2]
    equal = read(data, weights(*[7] * 10))
    alike = training_plan(equal, recipe_with(data))
    assert sorted(alike.order(0).tolist()) == list(range(10))


def test_the_weights_are_part_of_the_data(data):
    prints = [fingerprint(read(data, weights(*own))) for own in ([1] * 10, [2] * 10, [1] * 9 + [0])]
    prints += [fingerprint(training_set(replace(data, image_weights=""), masks="none"))]
    assert len(set(prints)) == 4


def _read_together(world: World, data: Data) -> tuple[str, list[float], int]:
    dataset = once_a_host(world, lambda: training_set(data, masks="none"))
    return fingerprint(dataset), dataset.weights.tolist(), dataset.num_weightless


def test_ranks_that_map_the_data_set_have_its_weights(data):
    read(data, weights(0, *[2] * 8, 3))
    first, second = run_in_ranks(_read_together, 2, data)
    assert first == second
    assert first[1:] == ([*[2.0] * 8, 3.0], 1)


def test_describe_says_how_many_are_left_out(data):
    read(data, weights(0, 0, 0.5, *[1] * 6, 4))
    (row,) = [row for row in describe(recipe_with(data), 1) if row.key == "image_weights"]
    assert row.text == "0.5 to 4, 2 images left out (weight 0)"
    assert row.value == {"left_out": 2, "smallest": 0.5, "largest": 4.0}
    (row,) = [row for row in describe(recipe_with(data), 1) if row.key == "data"]
    assert row.value["images"] == 8


def test_columns_have_any_order_and_others_are_ignored(data):
    lines = [f"{number};x;{number + 1};a {number}.png" for number in range(10)]
    dataset = read(data, ["index;note;Weight;file_name", *lines])
    assert dataset.weights.tolist() == list(range(1, 11))


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["file_name,wieght", "a 0.png,1"], r"weights\.csv: its first line needs one column weight"),
        ([""], r"its first line needs one column file_name; write: file_name,weight"),
        (["file_name,weight,weight", "a 0.png,1,1"], r"one column weight"),
        (weights(*[1] * 12), r"weights\.csv:13: .*json has no image with file_name 'a 11\.png'; did you mean 'a 1"),
        ([*weights(*[1] * 10), "a 3.png,1"], r"csv:12: a second weight of 'a 3\.png': leave one"),
        (weights(1, 1, -1), r"csv:4: the weight of 'a 2\.png' is '-1': give 0 to 1e\+06"),
        (weights(1, "nan"), r"csv:3: the weight of 'a 1\.png' is 'nan'"),
        (weights(1, "inf"), r"csv:3: the weight of 'a 1\.png' is 'inf'"),
        (weights("often"), r"csv:2: the weight of 'a 0\.png' is 'often'"),
        (weights("1e7"), r"csv:2: the weight of 'a 0\.png' is '1e7'"),
        (["file_name,weight", "a 0.png"], r"csv:2: 1 fields, fewer than the first line has"),
        (weights(*[1] * 9), r"no weight of 'a 9\.png' in .*instances\.json: give every image a line"),
        (weights(*[1] * 3), r"no weight of 'a 3\.png' in .*json, nor of 6 others"),
        (weights(*[0] * 10), r"every weight is 0, so no image is left to train on"),
    ],
)
def test_what_is_wrong_in_a_table_is_refused_in_one_line(data, lines, why):
    with pytest.raises(InputError, match=why):
        read(data, lines)


def test_a_table_that_is_missing_is_refused(data):
    with pytest.raises(InputError, match=r"weights\.csv: no such file; data\.image_weights names it"):
        training_set(data, masks="none")


def test_an_empty_image_needs_a_weight_only_if_it_is_trained_on(data):
    assert len(read(data, weights(*[1] * 10))) == 10
    with pytest.raises(InputError, match=r"no weight of 'a 10\.png'"):
        read(replace(data, keep_empty_images=True), weights(*[1] * 10))
    assert len(read(replace(data, keep_empty_images=True), weights(*[1] * 11))) == 11


def test_too_few_images_with_a_weight_are_refused(data):
    dataset = read(data, weights(1, 1, 1, *[0] * 7))
    with pytest.raises(InputError, match="3 images to train on are not enough for one mini-batch of 4"):
        training_plan(dataset, recipe_with(data))
