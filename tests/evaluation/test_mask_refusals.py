"""Masks that cannot be evaluated."""

import pytest

from mask_tasks import box_mask, encoded, evaluated, found_of, truth_of
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import evaluate_detections

GOOD = encoded(box_mask(0, 0, 10, 10))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, r"the detections: \[1\] of image 1 has no segmentation, other detections have one"),
        (
            {"size": [30, 41], "counts": GOOD["counts"]},
            r"\[1\] of image 1: segmentation is an RLE of 30 x 41 pixels \(height x width\), the image has 30 x 40",
        ),
        (
            {"size": [40, 30], "counts": GOOD["counts"]},
            r"\[1\] of image 1: segmentation is an RLE of 40 x 30 pixels \(height x width\), the image has 30 x 40",
        ),
        ({"size": [30, 40], "counts": GOOD["counts"][:-1]}, r"\[1\] of image 1: segmentation is an RLE whose counts"),
        ({"size": [30, 40], "counts": GOOD["counts"] + "5"}, r"\[1\] of image 1: segmentation is an RLE whose counts"),
        ({"size": [30, 40], "counts": "ö"}, r"\[1\] of image 1: segmentation is an RLE whose counts"),
        ({"size": [30, 40], "counts": "o" * 50}, r"\[1\] of image 1: segmentation is an RLE whose counts"),
        ({"size": [30, 40], "counts": ""}, r"\[1\] of image 1: segmentation is an RLE whose counts"),
        (
            {"size": [30, 40], "counts": [100, 200]},
            r"\[1\] of image 1: segmentation is an RLE whose counts add up to 300 pixels, not to 30 x 40",
        ),
        ({"size": [30, 40], "counts": [1300, -100]}, r"\[1\]\.segmentation\.counts.*expected int >= 0"),
        ({"size": [30, 40], "counts": [2**70]}, r"\[1\]\.segmentation\.counts"),
        ({"size": [0, 40], "counts": [0]}, r"\[1\]\.segmentation\.size\[0\]: expected int >= 1"),
        ({"size": [30], "counts": [0]}, r"\[1\]\.segmentation\.size: expected array of length 2"),
        ({"size": [30, 40]}, r"\[1\]\.segmentation: object missing required field counts"),
        ([[0, 0, 5, 0, 5, 5]], r"\[1\]\.segmentation: expected object"),
    ],
)
def test_a_mask_of_a_detection_that_cannot_be_evaluated_is_refused_with_its_place(wrong, message):
    found = found_of(GOOD, wrong)
    with pytest.raises(InputError, match=message) as refused:
        evaluated(truth_of(GOOD), found)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, r"the ground truth: annotations\[1\] of image 1 has no segmentation, the detections have some"),
        ([], r"annotations\[1\] of image 1 has no segmentation"),
        (
            {"size": [30, 39], "counts": [1170]},
            r"annotations\[1\] of image 1: segmentation is an RLE of 30 x 39 pixels \(height x width\), the image",
        ),
        ({"size": [30, 40], "counts": [7]}, r"annotations\[1\] of image 1: segmentation is an RLE whose counts"),
        ([[1, 1, 5, 5]], r"annotations\[1\] of image 1: segmentation has a polygon .* of 2 points, it takes 3"),
        (
            [[1, 1, 5, 5, 3, 2, 7]],
            r"annotations\[1\] of image 1: segmentation has a polygon .* of 7 numbers: x and y must be pairs",
        ),
        ([[1, 1, 5, 5, 3, 1e9]], r"annotations\[1\] of image 1: segmentation has a polygon .* outside of it"),
        ([[1, 1, 5, 5, 3, None]], r"annotations\[1\]\.segmentation\[0\]\[5\]: expected float, got null"),
        ("x", r"annotations\[1\]\.segmentation: expected"),
    ],
)
def test_a_mask_of_the_ground_truth_that_cannot_be_evaluated_is_refused_with_its_place(wrong, message):
    with pytest.raises(InputError, match=message) as refused:
        evaluated(truth_of(GOOD, wrong), found_of(GOOD))
    assert "\n" not in str(refused.value)


def test_polygons_that_would_take_minutes_and_gigabytes_to_paint_are_refused():
    truth = truth_of([[0, 0, 6000, 6000] * 1000])
    truth["images"][0] |= {"width": 6000, "height": 6000}
    with pytest.raises(InputError, match=r"outline is 1.2e\+07 pixels long, more than 10 million"):
        evaluated(truth, found_of({"size": [6000, 6000], "counts": [36_000_000]}))


@pytest.mark.parametrize("edge", [65536, 1_000_000, 2e9])
def test_a_size_of_more_pixels_than_runs_can_count_is_refused(edge):
    truth, most = truth_of(GOOD), 2**31 - 1
    truth["images"][0] |= {"width": edge, "height": edge}
    with pytest.raises(InputError, match=r"images\[0\]: .* is not a size of an image in pixels"):
        evaluated(truth, found_of(GOOD))
    with pytest.raises(InputError, match=r"\[0\]\.segmentation: a mask of 2147483647 x 3 pixels, more than 4294967295"):
        evaluated(truth_of(GOOD), found_of({"size": [most, 3], "counts": [most] * 3}))


def test_polygons_need_the_size_of_their_image():
    with pytest.raises(InputError, match=r"annotations\[0\] of image 1: .* the image has no width and height"):
        evaluated(truth_of([[1, 1, 5, 1, 5, 5]], sizes=False), [])
    mask = box_mask(1, 1, 4, 4)
    assert evaluated(truth_of([[1, 1, 5, 1, 5, 5, 1, 5]], sizes=False), found_of(encoded(mask))).segm.AP == 1.0


def test_without_masks_the_segmentation_of_the_ground_truth_is_not_looked_at():
    truth = truth_of("anything", {"size": "x"})
    assert evaluate_detections(truth, []).segm is None
