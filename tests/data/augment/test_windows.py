"""Parts of images at several scales: drawn by the plan from sizes alone, and cut from pixels, boxes and masks alike."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_factories import box_row, image_row, unpacked_masks
from megdet.data.augment.windows import window_of
from megdet.data.coco import CocoDataset, load_coco, training_set, write_coco
from megdet.data.loader import training_batches
from megdet.data.masks import place_mask
from megdet.data.plan import TrainingPlan
from megdet.data.planned import Crop, PlannedImage, Window
from megdet.data.segmentations import Segmentation
from megdet.data.transforms import load_batch
from megdet.distributed.layout import choose_layout
from megdet.recipe import Data, Recipe
from plans import some_sizes, steps_of
from recipe_refusals import refusal
from small_runs import CPU, small_recipe, write_small_set


def plan_with(probability: float, **data) -> TrainingPlan:
    own = Data(crop_probability=probability, short_edges=(40, 60), **data)
    return TrainingPlan(some_sizes(23), Recipe(batch_size=8, bn_size=4, plan_window=3, data=own))


@pytest.mark.parametrize("more", [{}, {"crop": (48, 64), "scale_jitter": (0.3, 2.0), "copy_paste": 0.5}])
def test_parts_change_nothing_else_in_the_plan(more):
    groups = [steps_of(plan_with(part, **more), 0, 20) for part in (0.0, 0.4, 1.0)]
    for plain, some, every in zip(*groups, strict=True):
        assert plain.canvas == some.canvas == every.canvas
        for whole, maybe, part in zip(plain.images, some.images, every.images, strict=True):
            assert whole.window is None
            assert maybe.window in (None, part.window)
            assert replace(part, window=None, paste=None) == replace(whole, paste=None)
    some = [image.window is not None for group in groups[1] for image in group.images]
    assert 0.25 < np.mean(some) < 0.55  # 160 images


@given(st.integers(1, 90), st.integers(1, 90), st.integers(-(2**63), 2**63 - 1))
def test_a_part_has_the_shape_of_its_image_and_lies_in_it(height, width, seed):
    data = Data(crop_probability=1.0, crop_scales=(0.4, 0.9), crop_least_area=0.25)
    window = window_of(seed, (height, width), data)
    if window is None:
        assert max(height, width) * 0.9 > max(height, width) - 0.5 or max(height, width) < 6
        return
    assert window.least_area == 0.25
    for corner, own, length in zip(window.corner, window.size, (height, width), strict=True):
        assert 0 <= corner <= length - own
        assert max(1, round(0.4 * length)) <= own <= max(1, round(0.9 * length))
    assert abs(window.size[0] / height - window.size[1] / width) <= 0.5 / height + 0.5 / width or min(height, width) < 3


def test_scales_and_places_are_spread_over_all_that_is_allowed():
    data = Data(crop_probability=1.0, crop_scales=(0.5, 1.0))
    windows = [window for seed in range(500) if (window := window_of(seed, (1000, 500), data))]
    scales = np.array([window.size[0] / 1000 for window in windows])
    places = np.array([window.corner[1] / (500 - window.size[1] + 1) for window in windows])
    for values, low, high in ((scales, 0.5, 1.0), (places, 0.0, 1.0)):
        counts, _ = np.histogram(values, 5, (low, high))
        assert counts.min() > 60  # 100 on average
    assert window_of(3, (1000, 500), replace(data, crop_probability=0.0)) is None


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CocoDataset:
    """An image of 40 x 20 px with a polygon, an RLE and a crowd."""
    folder: Path = tmp_path_factory.mktemp("windows")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    runs = np.zeros((20, 40), np.uint8)
    runs[10:20, 20:38] = 1
    turns = np.flatnonzero(np.diff(np.concatenate([[0], runs.T.ravel()])))
    counts = np.diff(np.concatenate([[0], turns, [800]])).tolist()
    write_coco(
        folder / "all.json",
        images=[image_row(1, "a.png", 40, 20)],
        annotations=[
            box_row(1, 1, 7, [4, 2, 10, 6], segmentation=[[4, 2, 14, 2, 14, 8, 4, 8]]),
            box_row(2, 1, 5, [0, 0, 40, 20], iscrowd=1, segmentation={"size": [20, 40], "counts": [0, 800]}),
            box_row(3, 1, 5, [20, 10, 18, 10], segmentation={"size": [20, 40], "counts": counts}),
        ],
        categories=[{"id": 5, "name": "five"}, {"id": 7, "name": "seven"}],
    )
    return load_coco(folder / "all.json", folder, keep_empty=True, with_masks=True)


def load(dataset: CocoDataset, size: tuple[int, int], window: Window, **more):
    return load_batch(dataset, [PlannedImage(0, 0, 5, size, window=window, **more)], (64, 96))


@pytest.mark.parametrize(
    ("flip", "first", "second"),
    [(False, [0, 0, 12, 12], [24, 16, 60, 40]), (True, [48, 0, 60, 12], [0, 16, 36, 40])],
)
def test_boxes_and_masks_of_a_part_by_hand(dataset, flip, first, second):
    # columns 8 to 38 become 60 px, rows 2 to 20 become 40
    batch = load(dataset, (40, 60), Window((2, 8), (18, 30), 0.0), flip_horizontal=flip)
    scale = 40 / 18
    assert batch.scales[0].tolist() == pytest.approx([scale, 2.0])
    assert batch.targets.labels[0, :3].tolist() == [1, 0, -1]
    ends = [(0, 6 * scale), (8 * scale, 40)]
    for row, (box, (top, bottom)) in enumerate(zip((first, second), ends, strict=True)):
        found = batch.targets.boxes[0, row].tolist()
        assert found == pytest.approx([box[0], top, box[2], bottom], abs=1e-5)
        mask = unpacked_masks(batch)[0][row]
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1] == pytest.approx(found, abs=0.6)
        assert mask.sum() == len(xs) * len(ys)


def test_a_part_holds_the_pixels_of_the_file(dataset):
    pixels = np.asarray(Image.open(dataset.image_path(0)))
    batch = load(dataset, (10, 20), Window((3, 7), (10, 20), 0.0))
    assert np.array_equal(batch.pixels[0, :, :10, :20].permute(1, 2, 0).numpy(), pixels[3:13, 7:27])


@pytest.mark.parametrize(
    ("least", "labels"),
    [(0.0, [1, 0]), (0.29, [1, 0]), (0.31, [0]), (0.55, [0]), (0.56, [])],  # 3 of 10 and 10 of 18 columns are left
)
def test_boxes_of_which_too_little_is_left_are_no_targets(dataset, least, labels):
    targets = load(dataset, (40, 60), Window((0, 11), (20, 19), least)).targets
    assert targets.labels[targets.is_box].tolist() == labels
    assert targets.masks is not None
    assert (targets.masks.frames[0, :, 3] > 0).sum() == len(labels)


def test_a_part_that_is_cut_again_counts_what_both_leave(dataset):
    window = Window((0, 11), (20, 20), 0.0)  # at twice the size: boxes from 0 to 6 and from 18 to 40
    for least, labels in ((0.14, [1]), (0.16, [])):
        crop = Crop((40, 40), (0, 3), least)  # three of the twenty pixels of the first box
        targets = load(dataset, (40, 15), window, crop=crop).targets
        assert targets.labels[targets.is_box].tolist() == labels


@given(st.data())
def test_a_mask_of_a_part_is_that_part_of_the_mask(data):
    """Runs at the file's size exactly; polygons but for the rounding of vertices outside of the part."""
    height, width = data.draw(st.integers(4, 30)), data.draw(st.integers(4, 30))
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    window = Window((top, left), (h, w), 0.0)

    def on_canvas(placed, size):
        whole = np.zeros(size, bool)
        whole[placed.y : placed.y + placed.pixels.shape[0], placed.x : placed.x + placed.pixels.shape[1]] = (
            placed.pixels
        )
        return whole

    pixels = np.random.default_rng(data.draw(st.integers(0, 99))).random((height, width)) < 0.4
    turns = np.flatnonzero(np.diff(np.concatenate([[False], pixels.T.ravel()])))
    runs = np.diff(np.concatenate([[0], turns, [height * width]])).astype(np.int32)
    found = place_mask(Segmentation((), runs), (height, width), (h, w), window)
    assert np.array_equal(on_canvas(found, (h, w)), pixels[top : top + h, left : left + w])

    x, y = st.integers(0, width), st.integers(0, height)
    points = data.draw(st.lists(st.tuples(x, y), min_size=3, max_size=5))
    polygon = Segmentation((np.array(points, np.float32),), np.zeros(0, np.int32))
    cut = on_canvas(place_mask(polygon, (height, width), (h, w), window), (h, w))
    whole = on_canvas(place_mask(polygon, (height, width), (height, width)), (height, width))
    assert (cut != whole[top : top + h, left : left + w]).sum() <= 2 * (h + w)


def batches(recipe: Recipe, dataset: CocoDataset, rank: int = 0, ranks: int = 1, workers: int = 0):
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, ranks, ranks)
    plan = TrainingPlan(dataset.sizes, recipe)
    return list(training_batches(dataset, plan, layout, rank, (0, 2), workers=workers, device=CPU))


def test_parts_are_the_same_on_every_layout_for_every_worker_and_from_the_cache(tmp_path):
    write_small_set(tmp_path, "train", 10)
    recipe = small_recipe(tmp_path)
    recipe = replace(recipe, data=replace(recipe.data, crop_probability=0.8, crop_scales=(0.3, 0.8), copy_paste=0.5))
    dataset = training_set(recipe.data, masks="all")
    one = batches(recipe, dataset)
    kept = replace(recipe, data=replace(recipe.data, cache="decoded", cache_folder=str(tmp_path / "kept")))
    for other in (batches(recipe, dataset, workers=1), batches(kept, dataset), batches(kept, dataset)):
        for ours, theirs in zip(one, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), theirs.tensors(), strict=True))
    halves = [batches(recipe, dataset, rank=rank, ranks=2) for rank in range(2)]
    for whole, *parts in zip(one, *halves, strict=True):
        assert torch.equal(whole.pixels, torch.cat([part.pixels for part in parts]))


@pytest.mark.parametrize("scales", ["[0, 1]", "[0.8, 0.5]", "[0.5, 1.5]"])
def test_factors_that_are_no_parts_are_refused(scales):
    assert "two factors above 0 and at most 1, the smaller first" in refusal("", data__crop_scales=scales)


def test_parts_are_not_kept_resized():
    message = refusal("", data__cache="resized", data__crop_probability="0.5")
    assert "another place in every epoch (data.crop_probability): cache decoded" in message
