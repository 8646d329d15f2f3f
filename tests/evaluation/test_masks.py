import contextlib
import copy
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from data_factories import SHARED_DATA, needs_shared_data
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import Evaluation, evaluate_detections, evaluate_files
from megdet.evaluation.tables import tables

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
SIZE = (30, 40)
"""height and width of the images here"""


def encoded(mask: np.ndarray, *, packed: bool = True) -> dict:
    own = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    if packed:
        return {"size": list(mask.shape), "counts": own["counts"].decode()}
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, len(flat)]).tolist()}


def box_mask(x: int, y: int, width: int, height: int, size=SIZE) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def truth_of(*masks, sizes=True, **keys) -> dict:
    """One image whose objects are all of the first class of two."""
    image = {"id": 1, "height": SIZE[0], "width": SIZE[1]} if sizes else {"id": 1}
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "segmentation": mask} | keys
        for i, mask in enumerate(masks, start=1)
    ]
    return {"images": [image], "categories": [{"id": 1, "name": "cat"}, {"id": 2}], "annotations": annotations}


def found_of(*masks, **keys) -> list[dict]:
    found = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]}
    return [found | {"score": 0.9 - 0.01 * i, "segmentation": mask} | keys for i, mask in enumerate(masks)]


def evaluated(truth, found) -> Evaluation:
    return evaluate_detections(truth, found, has_masks=True)


def numbers_of_pycocotools(truth, found) -> list[float]:
    """Without the boxes of the detections: beside one, pycocotools takes the box's area for the mask's."""
    truth = copy.deepcopy(truth)
    found = [{key: copy.deepcopy(value) for key, value in own.items() if key != "bbox"} for own in found]
    for own in found:
        if isinstance(own["segmentation"]["counts"], list):
            own["segmentation"] = rle.frPyObjects(own["segmentation"], *own["segmentation"]["size"])
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = truth
        api.createIndex()
        evaluation = COCOeval(api, api.loadRes(found), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def assert_equal_to_pycocotools(truth, found) -> Evaluation:
    numbers = evaluated(truth, found)
    assert numbers.segm is not None
    ours = [getattr(numbers.segm, key) for key in KEYS]
    assert ours == pytest.approx(numbers_of_pycocotools(truth, found), abs=1e-9)
    return numbers


def perturbed(mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The mask shifted by some pixels, then eroded or grown by one or two, or with a piece cut out."""
    moved = np.roll(mask, random.integers(-4, 5, 2), axis=(0, 1))
    for _ in range(random.integers(0, 3)):
        shifts = [np.roll(moved, step, axis) for step in (1, -1) for axis in (0, 1)]
        moved = np.logical_and.reduce([moved, *shifts]) if random.random() < 0.5 else np.logical_or.reduce(shifts)
    if random.random() < 0.3:
        moved[: moved.shape[0] // 2] = False
    return moved


@needs_shared_data
def test_perturbed_masks_of_real_photos_get_the_numbers_of_pycocotools(capfd):
    file = SHARED_DATA / "coco_mini" / "annotations" / "instances_val2017.json"
    truth = json.loads(file.read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(str(file))
    random = np.random.default_rng(0)
    found = []
    for annotation in truth["annotations"]:
        mask = api.annToMask(annotation).astype(bool)
        for _ in range(random.integers(0, 3)):
            own = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
            if random.random() < 0.1:
                own["category_id"] = truth["categories"][random.integers(80)]["id"]
            found.append(own | {"score": round(random.random(), 2), "segmentation": encoded(perturbed(mask, random))})
    assert sum(annotation["iscrowd"] for annotation in truth["annotations"]) > 0
    numbers = assert_equal_to_pycocotools(truth, found)
    assert 0.05 < numbers.segm.AP < 0.9
    assert min(numbers.segm.APs, numbers.segm.APm, numbers.segm.APl) > 0.02
    assert capfd.readouterr() == ("", ""), "it is quiet"
    bbox = evaluate_detections(truth, [{k: v for k, v in own.items() if k != "segmentation"} for own in found]).bbox
    assert numbers.bbox == bbox, "boxes are counted as without masks"


def random_masks(seed: int) -> tuple[dict, list[dict]]:
    """Rectangles and noise of every size, crowds, polygons, packed lengths and plain ones, many equal scores."""
    random = np.random.default_rng(seed)
    images = [
        {"id": int(identity), "height": int(random.integers(20, 200)), "width": int(random.integers(20, 200))}
        for identity in random.permutation(50)[:4] + 1
    ]

    def draw(image) -> np.ndarray:
        height, width = image["height"], image["width"]
        y, x = random.integers(0, height), random.integers(0, width)
        mask = box_mask(x, y, *random.integers(1, 150, 2), size=(height, width))
        return mask & (random.random(mask.shape) < 0.8) if random.random() < 0.3 else mask

    annotations, found = [], []
    for identity in range(1, 25):
        image = images[random.integers(len(images))]
        mask = draw(image)
        own = {"image_id": image["id"], "category_id": int(random.integers(1, 3))}
        segmentation = encoded(mask, packed=bool(random.random() < 0.5))
        is_crowd = int(random.random() < 0.2)
        if random.random() < 0.3 and not is_crowd:
            edges = [image["width"], image["height"]]
            corners, size = random.uniform(-0.2, 1, (2, 2)) * edges, random.uniform(0.05, 0.9, (2, 2)) * edges
            segmentation = [
                [x, y, x + w, y, x + w, y + h, x, y + h]
                for (x, y), (w, h) in zip(corners.tolist(), size.tolist(), strict=True)
            ]
        area = float(mask.sum()) * random.uniform(0.8, 1.2)
        more = {"id": identity, "iscrowd": is_crowd, "area": area, "bbox": [0, 0, 5, 5]}
        annotations.append(own | more | {"segmentation": segmentation})
        for _ in range(random.integers(0, 4)):
            if random.random() < 0.2:
                own = own | {"category_id": int(random.integers(1, 4))}
            near = perturbed(mask, random) if random.random() < 0.7 else draw(image)
            score = round(random.random(), 1)
            found.append(own | {"score": score, "bbox": [0, 0, 5, 5], "segmentation": encoded(near)})
    categories = [{"id": i, "name": f"class {i}"} for i in (1, 2, 3)]
    return {"images": images, "categories": categories, "annotations": annotations}, found


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_random_masks_get_the_numbers_of_pycocotools(seed):
    truth, found = random_masks(seed)
    if found:
        assert_equal_to_pycocotools(truth, found)


def test_masks_of_one_box_are_told_apart():
    left, right = box_mask(0, 0, 10, 20), box_mask(10, 0, 10, 20)
    numbers = evaluated(truth_of(encoded(left)), found_of(encoded(right)))
    assert numbers.bbox.AP == 1.0
    assert numbers.segm.AP == 0.0


def test_an_overlap_of_three_quarters_counts_at_six_of_ten_thresholds():
    numbers = evaluated(truth_of(encoded(box_mask(0, 0, 20, 20))), found_of(encoded(box_mask(0, 0, 15, 20))))
    assert pytest.approx(0.6) == numbers.segm.AP
    assert numbers.segm.AP75 == 1.0


def test_a_detection_in_a_crowd_is_neither_right_nor_wrong():
    truth = truth_of(encoded(box_mask(0, 0, 10, 10)), encoded(box_mask(20, 0, 20, 30)))
    truth["annotations"][1]["iscrowd"] = 1
    in_crowd = encoded(box_mask(22, 2, 5, 5))  # a small part of it, but all inside
    numbers = evaluated(truth, found_of(in_crowd, encoded(box_mask(0, 0, 10, 10))))
    assert numbers.segm.AP == 1.0
    assert numbers.segm.per_class["cat"].num_boxes == 1
    truth["annotations"][1]["iscrowd"] = 0
    assert evaluated(truth, found_of(in_crowd, encoded(box_mask(0, 0, 10, 10)))).segm.AP < 0.6


def test_the_size_of_an_object_is_that_of_its_mask():
    """A thin frame: its box is large, its mask small."""
    mask = box_mask(0, 0, 40, 30) & ~box_mask(1, 1, 38, 28)
    truth = truth_of(encoded(mask), bbox=[0, 0, 400, 300])
    found = found_of(encoded(mask), bbox=[0, 0, 400, 300])
    numbers = evaluated(truth, found)
    assert (numbers.segm.APs, numbers.segm.APl) == (1.0, -1.0), "136 pixels, although the file has no area"
    assert (numbers.bbox.APs, numbers.bbox.APl) == (-1.0, 1.0)
    truth["annotations"][0]["area"] = 50.0**2
    numbers = evaluated(truth, found)
    assert (numbers.segm.APs, numbers.segm.APm) == (-1.0, 1.0), "the file's area counts where there is one"
    missed = evaluated(truth, found_of(encoded(box_mask(0, 0, 40, 30)))).segm
    assert missed.APm == 0.0


def test_run_lengths_packed_or_not_and_polygons_are_the_same_mask():
    mask = box_mask(5, 3, 20, 10)
    polygon = [[5, 3, 25, 3, 25, 13, 5, 13]]
    found = found_of(encoded(mask))
    numbers = [evaluated(truth_of(own), found) for own in (encoded(mask), encoded(mask, packed=False), polygon)]
    assert numbers[0] == numbers[1] == numbers[2]
    assert numbers[0].segm.AP == 1.0
    assert evaluated(truth_of(encoded(mask)), found_of(encoded(mask, packed=False))) == numbers[0]


def test_no_detections_give_zero_for_masks_too():
    numbers = evaluated(truth_of(encoded(box_mask(0, 0, 5, 5))), [])
    assert numbers.segm.AP == numbers.bbox.AP == 0.0


def test_a_detection_without_a_pixel_is_wrong():
    numbers = evaluated(
        truth_of(encoded(box_mask(0, 0, 10, 10))),
        found_of(encoded(np.zeros(SIZE, bool)), encoded(box_mask(0, 0, 10, 10))),
    )
    assert pytest.approx(0.5) == numbers.segm.AP


def test_a_result_of_masks_alone_has_the_boxes_around_them():
    truth = truth_of(encoded(box_mask(5, 3, 20, 10)), bbox=[5, 3, 20, 10])
    found = found_of(encoded(box_mask(5, 3, 20, 10)))
    del found[0]["bbox"]
    numbers = evaluated(truth, found)
    assert numbers.bbox.AP == numbers.segm.AP == 1.0


def test_an_image_that_is_turned_by_its_exif_may_have_its_size_before_that_in_the_file():
    mask = box_mask(5, 3, 20, 10)
    truth = truth_of([[5, 3, 25, 3, 25, 13, 5, 13]])
    truth["images"][0] |= {"height": SIZE[1], "width": SIZE[0]}
    assert evaluated(truth, found_of(encoded(mask))).segm.AP == 1.0


def test_files_are_evaluated_by_masks_if_the_detections_have_some(tmp_path):
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    mask = encoded(box_mask(0, 0, 10, 10))
    truth.write_text(json.dumps(truth_of(mask)))
    found.write_text(json.dumps(found_of(mask)))
    numbers = evaluate_files(truth, found)
    assert numbers == evaluated(truth_of(mask), found_of(mask))
    assert list(numbers.as_dict()) == list(numbers.totals()) == ["bbox", "segm"]
    assert Evaluation.from_dict(json.loads(json.dumps(numbers.as_dict()))) == numbers
    bare = [{key: value for key, value in own.items() if key != "segmentation"} for own in found_of(mask)]
    found.write_text(json.dumps(bare))
    assert list(evaluate_files(truth, found).as_dict()) == ["bbox"]


def test_the_tables_are_of_boxes_and_then_of_masks():
    numbers = evaluated(truth_of(encoded(box_mask(0, 0, 20, 20))), found_of(encoded(box_mask(0, 0, 15, 20))))
    console = Console(width=100, file=io.StringIO())
    for table in tables(numbers):
        console.print(table)
    printed = console.file.getvalue()
    titles = ["COCO numbers, boxes", "Classes, boxes", "COCO numbers, masks", "Classes, masks"]
    places = [printed.index(title) for title in titles]
    assert places == sorted(places)
    assert "60.0" in printed[places[2] :]
    assert "60.0" not in printed[: places[2]]
    assert len(tables(Evaluation(numbers.bbox))) == 2


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
    with pytest.raises(InputError, match=r"images\[0\]: .* is no size of an image in pixels"):
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
