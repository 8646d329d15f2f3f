from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as V

from data_factories import box_row, image_row
from megdet.data.coco import CocoDataset, load_coco, write_coco
from megdet.data.planned import Crop, PlannedImage
from megdet.data.transforms import adjust_contrast, load_batch, resize, resize_as_torchvision
from megdet.structures import Batch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CocoDataset:
    """Image 0 of 40 x 20 px with two boxes and a crowd, image 1 of 10 x 30 px with nine boxes, image 2 without any."""
    folder: Path = tmp_path_factory.mktemp("transforms")
    random = np.random.default_rng(0)
    for name, height, width in (("a.png", 20, 40), ("b.png", 30, 10), ("c.png", 8, 8)):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    write_coco(
        folder / "all.json",
        images=[image_row(1, "a.png", 40, 20), image_row(2, "b.png", 10, 30), image_row(3, "c.png", 8, 8)],
        annotations=[
            box_row(1, 1, 7, [4, 2, 10, 6]),
            box_row(2, 1, 5, [0, 0, 40, 20], iscrowd=1),
            box_row(3, 1, 5, [20, 10, 20, 10]),
            *(box_row(10 + i, 2, 5, [1, i, 5, 10]) for i in range(9)),
        ],
        categories=[{"id": 5, "name": "five"}, {"id": 7, "name": "seven"}],
    )
    return load_coco(folder / "all.json", folder, keep_empty=True)


def load_one(dataset: CocoDataset, index: int, size: tuple[int, int], jitter: float = 0.0, **options) -> Batch:
    image = PlannedImage(index, 0, options.pop("seed", 5), size, **options)
    return load_batch(dataset, [image], (64, 96), jitter)


@pytest.mark.parametrize(
    ("horizontal", "vertical", "first", "second"),
    [  # 40 x 20 -> 60 x 40 px: x times 1.5, y times 2
        (False, False, [6, 4, 21, 16], [30, 20, 60, 40]),
        (True, False, [39, 4, 54, 16], [0, 20, 30, 40]),
        (False, True, [6, 24, 21, 36], [30, 0, 60, 20]),
        (True, True, [39, 24, 54, 36], [0, 0, 30, 20]),
    ],
)
def test_boxes_follow_the_pixels_by_hand(dataset, horizontal, vertical, first, second):
    batch = load_one(dataset, 0, (40, 60), flip_horizontal=horizontal, flip_vertical=vertical)
    assert batch.targets.boxes[0, :2].tolist() == [first, second]
    assert batch.targets.labels[0, :2].tolist() == [1, 0]
    assert batch.scales.tolist() == [[2.0, 1.5]]
    assert batch.sizes.tolist() == [[40, 60]]


def test_a_crowd_is_no_target_and_rows_without_a_box_stand_for_nothing(dataset):
    targets = load_one(dataset, 0, (20, 40)).targets
    assert targets.is_box.sum() == 2
    assert targets.labels[0].tolist() == [1, 0, *[-1] * 6]
    assert not targets.boxes[0, 2:].any()


def test_targets_are_padded_to_a_multiple_of_eight_boxes(dataset):
    images = [PlannedImage(index, 0, index, (16, 16)) for index in (2, 1)]
    targets = load_batch(dataset, images, (32, 32)).targets
    assert targets.labels.shape == (2, 16)
    assert targets.is_box.sum(1).tolist() == [0, 9]
    assert load_batch(dataset, images[:1], (32, 32)).targets.labels.shape == (1, 8)
    assert targets.image_seeds.tolist() == [2, 1]


@pytest.mark.parametrize("index", [0, 1])
def test_flipping_mirrors_the_pixels_within_the_image_and_leaves_the_padding(dataset, index):
    plain = load_one(dataset, index, (40, 60)).pixels[0]
    for options, axis in (({"flip_horizontal": True}, 2), ({"flip_vertical": True}, 1)):
        flipped = load_one(dataset, index, (40, 60), **options).pixels[0]
        assert torch.equal(flipped[:, :40, :60].flip(axis), plain[:, :40, :60])
        assert not torch.equal(flipped, plain)
        assert not flipped[:, 40:].any()
        assert not flipped[:, :, 60:].any()


def test_a_box_holds_the_same_pixels_after_a_flip(dataset):
    """A frame of integer corners, cut out of the flipped image and mirrored back, is the frame of the plain one."""
    plain, flipped = (load_one(dataset, 0, (20, 40), flip_horizontal=flip) for flip in (False, True))
    for row in range(2):
        (x1, y1, x2, y2), (u1, v1, u2, v2) = (b.targets.boxes[0, row].int().tolist() for b in (plain, flipped))
        assert torch.equal(plain.pixels[0, :, y1:y2, x1:x2], flipped.pixels[0, :, v1:v2, u1:u2].flip(2))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_resizing_is_pillows_bilinear_with_antialias(height, width, new_height, new_width):
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BILINEAR))
    found = resize(pixels, (new_height, new_width)).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_an_image_of_the_wanted_size_keeps_every_pixel(dataset):
    expected = np.asarray(Image.open(dataset.image_path(0)))
    assert np.array_equal(load_one(dataset, 0, (20, 40)).pixels[0, :, :20, :40].permute(1, 2, 0).numpy(), expected)


def test_an_empty_share_is_a_batch_of_no_images(dataset):
    batch = load_batch(dataset, [], (64, 96))
    assert batch.pixels.shape == (0, 3, 64, 96)
    assert batch.sizes.shape == (0, 2)
    assert batch.scales.shape == (0, 2)
    assert batch.image_index == ()
    assert batch.targets.boxes.shape == (0, 8, 4)
    assert batch.targets.labels.shape == (0, 8)
    assert batch.targets.image_seeds.shape == (0,)
    assert batch.sizes.dtype == batch.targets.image_seeds.dtype == torch.int64


def test_colour_jitter_is_drawn_by_the_seed_of_the_image_alone(dataset):
    first = load_one(dataset, 0, (40, 60), jitter=0.4, seed=1)
    torch.manual_seed(99)
    beside = load_batch(
        dataset, [PlannedImage(1, 0, 3, (30, 10)), PlannedImage(0, 7, 1, (40, 60))], (64, 96), color_jitter=0.4
    )
    assert torch.equal(first.pixels[0], beside.pixels[1])
    assert not torch.equal(first.pixels, load_one(dataset, 0, (40, 60), jitter=0.4, seed=2).pixels)
    plain = load_one(dataset, 0, (40, 60), seed=1)
    assert not torch.equal(first.pixels, plain.pixels)
    assert torch.equal(first.targets.boxes, plain.targets.boxes)
    assert not first.pixels[0, :, 40:].any()
    assert not first.pixels[0, :, :, 60:].any()


def test_colour_jitter_and_flip_commute(dataset):
    plain = load_one(dataset, 0, (40, 60), jitter=0.4).pixels[0, :, :40, :60]
    flipped = load_one(dataset, 0, (40, 60), jitter=0.4, flip_horizontal=True).pixels[0, :, :40, :60]
    assert torch.equal(plain, flipped.flip(2))


def test_a_thin_image_may_be_a_pixel_wide(dataset):
    batch = load_one(dataset, 1, (60, 1))
    assert batch.sizes.tolist() == [[60, 1]]
    assert batch.targets.is_box.sum() == 9


def test_the_canvas_is_channels_last_like_the_resized_image(dataset):
    assert load_one(dataset, 0, (40, 60)).pixels.is_contiguous(memory_format=torch.channels_last)


def test_resizing_as_torchvision_averages_the_four_nearest_pixels_by_hand():
    pixels = np.array([[[0] * 3, [100] * 3, [10] * 3, [30] * 3]] * 2, np.uint8)
    found = resize_as_torchvision(pixels, (1, 2))  # centres at 0.5 and 2.5 of 0 to 3
    assert found[:, 0].tolist() == [[50.0, 20.0]] * 3
    wide = resize_as_torchvision(pixels, (2, 8))
    assert wide[0, 0].tolist() == [0.0, 25.0, 75.0, 77.5, 32.5, 15.0, 25.0, 30.0]  # no whole numbers


def test_a_batch_resized_as_torchvision_has_floats_and_the_same_boxes_flips_and_colours(dataset):
    plain, theirs = (load_one(dataset, 0, (40, 60), resize=kind) for kind in ("antialias", "torchvision"))
    assert (plain.pixels.dtype, theirs.pixels.dtype) == (torch.uint8, torch.float32)
    assert torch.equal(plain.targets.boxes, theirs.targets.boxes)
    assert theirs.pixels.stride() == plain.pixels.stride()
    assert (theirs.pixels - plain.pixels).abs().max() < 1.1  # what grows has no antialias, but is rounded twice
    for options in ({"flip_horizontal": True, "flip_vertical": True}, {"jitter": 0.6}):
        plain, theirs = (load_one(dataset, 0, (40, 60), resize=k, **options) for k in ("antialias", "torchvision"))
        assert (theirs.pixels - plain.pixels).abs().max() <= 4
        assert theirs.pixels[:, :, 40:].abs().max() == 0
        assert 100 < theirs.pixels.max() <= 255


WHOLE = (40, 80)
"""Image 0 at twice its size; its boxes are then 8, 4, 28, 16 and 40, 20, 80, 40."""


@pytest.mark.parametrize(
    ("flips", "first", "second"),
    [
        ({}, [0, 0, 18, 10], [30, 14, 40, 30]),
        ({"flip_horizontal": True}, [22, 0, 40, 10], [0, 14, 10, 30]),
        ({"flip_vertical": True}, [0, 20, 18, 30], [30, 0, 40, 16]),
    ],
)
def test_boxes_are_moved_and_cut_at_the_crop_by_hand(dataset, flips, first, second):
    batch = load_one(dataset, 0, (30, 40), crop=Crop(WHOLE, (6, 10), 0.0), **flips)
    assert batch.targets.boxes[0, :2].tolist() == [first, second]
    assert batch.targets.labels[0].tolist() == [1, 0, *[-1] * 6]
    assert batch.scales.tolist() == [[2.0, 2.0]]
    assert batch.sizes.tolist() == [[30, 40]]


@pytest.mark.parametrize(
    ("corner", "least", "labels"),
    [
        ((6, 10), 0.2, [1, 0]),  # 180 of 240 and 160 of 800 pixels are left
        ((6, 10), 0.21, [1]),
        ((6, 10), 0.8, []),
        ((4, 8), 1.0, [1]),  # whole
        ((0, 0), 0.0, [1]),  # the second one touches the crop with its edge
        ((10, 28), 0.0, [0]),
    ],
)
def test_boxes_of_which_too_little_is_left_are_no_targets(dataset, corner, least, labels):
    targets = load_one(dataset, 0, (30, 40), crop=Crop(WHOLE, corner, least)).targets
    assert targets.labels[targets.is_box].tolist() == labels
    assert not targets.boxes[~targets.is_box].any()


def test_an_image_without_a_box_left_is_a_target_without_boxes(dataset):
    batch = load_one(dataset, 0, (4, 40), crop=Crop(WHOLE, (0, 40), 0.0))
    assert not batch.targets.is_box.any()
    assert batch.pixels[0, :, :4, :40].any()


@pytest.mark.parametrize("resize", ["antialias", "torchvision"])
def test_a_crop_holds_the_pixels_of_the_whole_resized_image(dataset, resize):
    whole = load_one(dataset, 0, WHOLE, resize=resize).pixels[0]
    crop = Crop(WHOLE, (6, 10), 0.0)
    pixels = load_one(dataset, 0, (30, 40), crop=crop, resize=resize).pixels[0]
    assert torch.equal(pixels[:, :30, :40], whole[:, 6:36, 10:50])
    assert not pixels[:, 30:].any()
    assert not pixels[:, :, 40:].any()
    flipped = load_one(dataset, 0, (30, 40), crop=crop, resize=resize, flip_horizontal=True).pixels[0]
    assert torch.equal(flipped[:, :30, :40], whole[:, 6:36, 10:50].flip(2))


@given(st.integers(1, 60), st.integers(1, 90), st.floats(0, 1), st.data())
def test_targets_of_a_crop_lie_in_it_and_have_an_area(dataset, height, width, least, data):
    corner = data.draw(st.integers(0, 60 - height)), data.draw(st.integers(0, 90 - width))
    targets = load_one(dataset, 0, (height, width), crop=Crop((60, 90), corner, least)).targets
    boxes = targets.boxes[targets.is_box]
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()
    assert ((boxes[:, 2:] - boxes[:, :2]) > 0).all()


def test_contrast_does_not_depend_on_how_many_threads_add_the_mean():
    pixels = torch.randint(256, (3, 416, 640), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    kinds, threads = (pixels, pixels / 255), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append([adjust_contrast(own, 0.37) for own in kinds])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for own in found for pair in zip(own, found[0], strict=True))
    for ours, own, near in zip(found[0], kinds, (1, 1e-6), strict=True):
        assert (ours.double() - V.adjust_contrast(own, 0.37).double()).abs().max() <= near
