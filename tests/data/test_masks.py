import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_factories import (
    SHARED_DATA,
    box_row,
    coco_mask,
    image_row,
    needs_shared_data,
    triangle,
    two_images,
    unpacked_masks,
    with_masks,
    write_set,
)
from megdet.data.cache import image_cache
from megdet.data.coco import load_coco
from megdet.data.masks import place_mask
from megdet.data.planned import Crop, PlannedImage
from megdet.data.segmentations import Segmentation
from megdet.data.transforms import load_batch, make_masks
from megdet.recipe import Data

NO_RUNS = np.zeros(0, np.int32)


def polygons(*outlines):
    return Segmentation(tuple(np.array(own, np.float32).reshape(-1, 2) for own in outlines), NO_RUNS)


def runs_of(pixels):
    flat = np.asarray(pixels, bool).T.ravel()
    turns = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
    return Segmentation((), np.diff(np.concatenate([[0], turns, [flat.size]])).astype(np.int32))


def on_canvas(placed, size):
    whole = np.zeros(size, bool)
    height, width = placed.pixels.shape
    whole[placed.y : placed.y + height, placed.x : placed.x + width] = placed.pixels
    return whole


def test_a_frame_is_the_smallest_around_the_pixels_of_a_polygon_by_hand():
    placed = place_mask(polygons([2.5, 1, 6, 1, 6, 3, 2.5, 3]), (10, 20), (10, 20))
    assert (placed.x, placed.y, placed.pixels.shape) == (3, 1, (2, 3))  # the middle of pixel 2 is not inside
    assert placed.pixels.all()
    doubled = place_mask(polygons([2.5, 1, 6, 1, 6, 3, 2.5, 3]), (10, 20), (40, 40))
    assert (doubled.x, doubled.y, doubled.pixels.shape) == (5, 4, (8, 7))
    assert doubled.pixels.all()


def test_an_object_is_the_union_of_its_polygons():
    both = place_mask(polygons([0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 9, 2, 9, 4, 2, 4]), (10, 20), (10, 20))
    expected = np.zeros((10, 20), bool)
    expected[:4, :4] = expected[2:4, 2:9] = True
    assert np.array_equal(on_canvas(both, (10, 20)), expected)


def test_what_lies_outside_of_the_image_is_cut_off_and_may_be_all():
    placed = place_mask(polygons([-5, -5, 30, -5, 30, 3, -5, 3]), (10, 20), (10, 20))
    assert (placed.x, placed.y, placed.pixels.shape) == (0, 0, (3, 20))
    assert placed.pixels.all()
    for outside in ([-9, 1, -5, 1, -5, 4], [1, 10, 5, 10, 5, 14]):
        assert place_mask(polygons(outside), (10, 20), (10, 20)).pixels.size == 0
    assert place_mask(polygons(), (10, 20), (10, 20)).pixels.size == 0
    assert place_mask(Segmentation((), np.array([200], np.int32)), (10, 20), (5, 10)).pixels.size == 0


_edges = st.integers(1, 40)


@given(st.data(), _edges, _edges, _edges, _edges)
def test_polygons_become_the_pixels_that_the_coco_api_gives_the_whole_resized_image(data, h, w, new_h, new_w):
    coordinate = st.floats(-8, 48, width=32) | st.integers(-5, 45).map(lambda n: n / 2)
    outlines = data.draw(
        st.lists(st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=6), min_size=1, max_size=3)
    )
    values = [[float(v) for point in own for v in point] for own in outlines]
    placed = place_mask(polygons(*values), (h, w), (new_h, new_w))
    assert np.array_equal(on_canvas(placed, (new_h, new_w)), coco_mask(values, (h, w), (new_h, new_w)).astype(bool))


def test_runs_of_an_image_that_keeps_its_size_keep_every_pixel():
    pixels = np.random.default_rng(0).random((13, 17)) > 0.8
    pixels[:2] = pixels[:, 12:] = False
    placed = place_mask(runs_of(pixels), (13, 17), (13, 17))
    assert np.array_equal(on_canvas(placed, (13, 17)), pixels)
    assert placed.y >= 2
    assert placed.x + placed.pixels.shape[1] <= 12


@given(_edges, _edges, _edges, _edges, st.integers(0, 9))
def test_runs_are_resized_as_pillow_resizes_the_whole_mask_and_lie_in_their_frame(h, w, new_h, new_w, seed):
    random = np.random.default_rng(seed)
    pixels = np.zeros((h, w), bool)
    (y1, y2), (x1, x2) = (np.sort(random.integers(0, edge + 1, 2)) for edge in (h, w))
    pixels[y1:y2, x1:x2] = random.random((y2 - y1, x2 - x1)) > 0.3
    values = np.asarray(
        Image.fromarray(pixels.astype(np.uint8) * 255).resize((new_w, new_h), Image.Resampling.BILINEAR)
    )
    found = on_canvas(place_mask(runs_of(pixels), (h, w), (new_h, new_w)), (new_h, new_w))
    is_clear = np.abs(values.astype(int) - 127.5) > 2  # the two axes are resized in another order
    assert np.array_equal(found[is_clear], (values >= 128)[is_clear])


def test_runs_of_half_size_show_where_at_least_half_of_four_pixels_are_the_objects():
    pixels = np.zeros((20, 20), bool)
    pixels[4:12, 6:14] = True
    found = on_canvas(place_mask(runs_of(pixels), (20, 20), (10, 10)), (10, 10))
    expected = np.zeros((10, 10), bool)
    expected[2:6, 3:7] = True
    assert np.array_equal(found, expected)


def test_bits_follow_each_other_without_gaps_by_hand():
    first = place_mask(polygons([1, 1, 4, 1, 4, 2, 1, 2]), (8, 8), (8, 8))
    second = place_mask(polygons([0, 0, 2, 0, 2, 3, 0, 3]), (8, 8), (8, 8))
    masks = make_masks([[first, second], []], 3)
    assert masks.frames[0].tolist() == [[0, 1, 1, 3, 1], [3, 0, 0, 2, 3], [0] * 5]
    assert not masks.frames[1].any()
    assert masks.bits.dtype == torch.uint8
    assert masks.bits.shape == (2, 1024)
    expected = [*first.pixels.ravel(), *second.pixels.ravel()]
    assert np.unpackbits(masks.bits[0].numpy())[:9].tolist() == expected
    assert expected[:3] == [1, 1, 1]
    assert not masks.bits[0, 2:].any()
    assert not masks.bits[1].any()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Image 0 of 40 x 30 px with a polygon, image 1 with runs and a crowd, image 2 without any, image 3 with nine."""
    document = with_masks(two_images())
    pixels = np.zeros((30, 40), bool)
    pixels[3:20, 2:9] = pixels[10:14, 2:30] = True
    counts = runs_of(pixels).runs.tolist()
    document["annotations"][0].update(bbox=[2, 3, 28, 17], segmentation={"size": [30, 40], "counts": counts})
    document["images"] += [image_row(5, "c.jpg", 8, 8), image_row(6, "d.jpg", 50, 70)]
    document["annotations"] += [
        box_row(30 + i, 6, 4, [i, 2 * i, 30, 40], segmentation=[triangle(i, 2 * i, 30, 40)]) for i in range(9)
    ]
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("masks")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return load_coco(*write_set(folder, document), keep_empty=True, with_masks=True)


def load(dataset, *images):
    return load_batch(dataset, [PlannedImage(index, 0, 5, size, **flips) for index, size, flips in images], (96, 96))


def test_masks_have_the_rows_of_their_boxes_and_crowds_none(dataset):
    batch = load(dataset, (0, (60, 80), {}), (1, (30, 40), {}), (2, (64, 64), {}), (3, (35, 25), {}))
    frames = batch.targets.masks.frames
    assert frames.shape == (4, 16, 5)
    assert torch.equal(frames[:, :, 3] > 0, batch.targets.is_box)
    assert torch.equal(frames[:, :, 3] > 0, frames[:, :, 4] > 0)
    low, high = frames[:, :, 1:3], frames[:, :, 1:3] + frames[:, :, 3:]
    boxes = batch.targets.boxes
    for found, edge in (
        (low, boxes[:, :, :2]),
        (high, boxes[:, :, 2:]),
    ):  # these objects reach the edges of their boxes
        assert (found - edge).abs().max() <= 1
    assert batch.targets.masks.bits.is_contiguous()


def test_without_masks_in_the_data_set_targets_have_none(tmp_path):
    dataset = load_coco(*write_set(tmp_path, with_masks(two_images())), keep_empty=True)
    assert load(dataset, (0, (30, 40), {})).targets.masks is None


@pytest.mark.parametrize("index", [0, 1, 3])
def test_masks_are_flipped_like_the_pixels(dataset, index):
    size = (57, 76)
    plain = unpacked_masks(load(dataset, (index, size, {})))[0]
    assert plain.any()
    for axes, flips in (
        ([2], {"flip_horizontal": True}),
        ([1], {"flip_vertical": True}),
        ([1, 2], {"flip_horizontal": True, "flip_vertical": True}),
    ):
        flipped = unpacked_masks(load(dataset, (index, size, flips)))[0]
        assert np.array_equal(np.flip(flipped[:, :57, :76], axes), plain[:, :57, :76])
        assert not flipped[:, 57:].any()
        assert not flipped[:, :, 76:].any()


def test_a_batch_of_no_images_has_no_masks_and_one_without_boxes_empty_ones(dataset):
    none = load_batch(dataset, [], (64, 96)).targets.masks
    assert (none.bits.shape, none.frames.shape) == ((0, 1024), (0, 8, 5))
    empty = load(dataset, (2, (64, 64), {})).targets.masks
    assert (empty.bits.shape, empty.frames.shape) == ((1, 1024), (1, 8, 5))
    assert not empty.bits.any()
    assert not empty.frames.any()


@pytest.mark.parametrize("kind", ["decoded", "resized"])
def test_kept_images_have_the_masks_of_those_that_are_read(dataset, tmp_path, kind):
    cache = image_cache(replace(Data(), cache=kind, cache_folder=str(tmp_path)), dataset)
    images = [PlannedImage(index, 0, 5, (45, 60), flip_horizontal=True) for index in (0, 1)]
    plain = load_batch(dataset, images, (64, 64))
    for _ in range(2):
        kept = load_batch(dataset, images, (64, 64), cache=cache)
        assert all(torch.equal(a, b) for a, b in zip(plain.tensors(), kept.tensors(), strict=True))
    assert list(tmp_path.rglob("*.pixels"))


@needs_shared_data
@pytest.mark.parametrize("factor", [1.0, 0.53, 1.7])
def test_masks_of_coco_mini_are_those_of_the_coco_api_at_the_size_of_the_canvas(factor):
    folder = SHARED_DATA / "coco_mini"
    file = folder / "annotations" / "instances_val2017.json"
    dataset = load_coco(file, folder / "val2017", keep_empty=True, with_masks=True)
    rows = {row["id"]: row for row in json.loads(Path(file).read_text())["annotations"]}
    num_polygons = 0
    for index in range(len(dataset)):
        original = tuple(dataset.sizes[index].tolist())
        size = tuple(round(edge * factor) for edge in original)
        annotations = dataset.annotations[index]
        own = dataset.annotations.segmentations_of(index)
        for number, is_crowd, one in zip(annotations.annotation_ids, annotations.is_crowd, own, strict=True):
            found, truth = on_canvas(place_mask(one, original, size), size), rows[number]["segmentation"]
            expected = coco_mask(truth, original, size if isinstance(truth, list) else original).astype(bool)
            if isinstance(truth, list):
                num_polygons += 1
                assert np.array_equal(found, expected)
            elif factor == 1:
                assert is_crowd
                assert np.array_equal(found, expected)
            else:
                assert found.mean() == pytest.approx(expected.mean(), rel=0.02)
    assert num_polygons > 500


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 30), st.integers(0, 30))
def test_a_cut_mask_has_the_pixels_that_lie_in_the_crop(height, width, top, left):
    placed = place_mask(polygons([12.0, 9.0, 50.0, 20.0, 30.0, 38.0], [3, 3, 9, 3, 9, 9]), (70, 90), (70, 90))
    cut = placed.cut((top, left), (height, width))
    expected = on_canvas(placed, (70, 90))[top : top + height, left : left + width]
    assert np.array_equal(on_canvas(cut, (height, width)), expected)
    assert expected.any() or cut.pixels.size == 0


@pytest.mark.parametrize("flip", [False, True])
def test_the_masks_of_a_crop_are_those_of_the_whole_image_and_belong_to_its_boxes(dataset, flip):
    whole = load(dataset, (3, (64, 80), {}))
    crop = Crop((64, 80), (35, 10), 0.1)
    cut = load(dataset, (3, (14, 60), {"crop": crop, "flip_horizontal": flip}))
    masks, boxes = unpacked_masks(whole)[0][:, 35:49, 10:70], whole.targets.boxes[0]
    low, high = torch.tensor([10.0, 35.0]), torch.tensor([70.0, 49.0])
    inside = (boxes[:, 2:].minimum(high) - boxes[:, :2].maximum(low)).clamp(min=0).prod(1)
    is_left = ((inside > 0) & (inside >= 0.1 * (boxes[:, 2:] - boxes[:, :2]).prod(1))).numpy()
    assert 0 < is_left.sum() < whole.targets.is_box.sum()
    assert cut.targets.is_box.sum() == is_left.sum()
    found = unpacked_masks(cut)[0][: is_left.sum(), :14, :60]
    assert found.any()
    assert np.array_equal(found, masks[is_left][:, :, :: -1 if flip else 1])
