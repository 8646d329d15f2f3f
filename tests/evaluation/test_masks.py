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
from mask_tasks import SIZE, box_mask, encoded, evaluated, found_of, truth_of
from megdet.evaluation.coco_numbers import Evaluation, evaluate_detections, evaluate_files
from megdet.evaluation.tables import tables

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


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
