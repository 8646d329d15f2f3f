import contextlib
import copy
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coco_tasks import detection, ground_truth, random_task
from data_factories import SHARED_DATA, needs_shared_data
from megdet.errors import InputError
from megdet.evaluation import coco_numbers, counting
from megdet.evaluation.coco_numbers import CocoNumbers, Evaluation

KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
GOLDEN = [0.503647, 0.696973, 0.571667, 0.593252, 0.557991, 0.489363]
GOLDEN += [0.386813, 0.593680, 0.595353, 0.654764, 0.603130, 0.553744]


def evaluate_detections(truth, detections) -> CocoNumbers:
    return coco_numbers.evaluate_detections(truth, detections).bbox


def evaluate_files(truth, detections) -> CocoNumbers:
    return coco_numbers.evaluate_files(truth, detections).bbox


def numbers_of_pycocotools(truth, detections):
    truth, detections = copy.deepcopy(truth), copy.deepcopy(detections)
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = truth
        api.createIndex()
        evaluation = COCOeval(api, api.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@needs_shared_data
def test_the_golden_numbers_of_the_coco_api_are_reproduced(capfd):
    golden = SHARED_DATA / "coco_eval_golden"
    results = golden / "results" / "instances_val2014_fakebbox100_results.json"
    numbers = evaluate_files(golden / "sampled_gts_bbox_area.json", results)
    assert [getattr(numbers, key) for key in KEYS] == pytest.approx(GOLDEN, abs=1e-6)
    assert capfd.readouterr() == ("", ""), "it is quiet"


@needs_shared_data
def test_ground_truth_fed_back_as_detections_is_perfect():
    file = SHARED_DATA / "coco_mini" / "annotations" / "instances_val2017.json"
    annotations = json.loads(file.read_text())["annotations"]
    detections = [
        {key: annotation[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for annotation in annotations
        if not annotation["iscrowd"]
    ]
    numbers = evaluate_detections(file, detections)
    assert [numbers.AP, numbers.AP50, numbers.AP75, numbers.APs, numbers.APm, numbers.APl, numbers.AR100] == [1.0] * 7
    assert pytest.approx([0.708023, 0.989082], abs=1e-6) == [numbers.AR1, numbers.AR10]
    assert sum(of_class.num_boxes for of_class in numbers.per_class.values()) == len(detections)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_random_detections_get_the_numbers_of_pycocotools(seed):
    truth, detections = random_task(seed)
    reference = numbers_of_pycocotools(truth, detections)
    numbers = evaluate_detections(truth, detections)
    assert [getattr(numbers, key) for key in KEYS] == pytest.approx(reference.stats.tolist(), abs=1e-9)
    for index, category in enumerate(truth["categories"]):
        precision = reference.eval["precision"][:, :, index, 0, 2]
        recall = reference.eval["recall"][:, index, 0, 2]
        found = numbers.per_class[category["name"]]
        assert pytest.approx([precision.mean(), precision[0].mean(), precision[5].mean(), recall.mean()], abs=1e-9) == [
            found.AP,
            found.AP50,
            found.AP75,
            found.AR100,
        ]


@pytest.mark.parametrize("limit", [1, 2])
def test_how_many_classes_are_counted_together_changes_no_number(limit, monkeypatch):
    truth, detections = random_task(5)
    whole = evaluate_detections(truth, detections)
    monkeypatch.setattr(counting, "_MOST_CLASSES", limit)
    assert evaluate_detections(truth, detections) == whole


def test_a_crowded_image_is_cut_at_a_hundred_detections_as_pycocotools_does():
    truth, detections = random_task(6, num_images=1, num_classes=2, num_detections=300)
    stats = numbers_of_pycocotools(truth, detections).stats.tolist()
    numbers = evaluate_detections(truth, detections)
    assert [getattr(numbers, key) for key in KEYS] == pytest.approx(stats, abs=1e-9)


def test_equal_overlaps_are_chosen_as_pycocotools_does():
    box, shifted = (10, 10, 40, 40), (14, 10, 40, 40)
    truth = ground_truth(box, box, shifted, shifted, (6, 10, 40, 40))
    truth["annotations"][1]["iscrowd"] = 1
    truth["annotations"][2]["area"] = 20.0
    detections = [detection(*own, score=score) for own in (box, (12, 10, 40, 40), shifted) for score in (0.9, 0.5, 0.4)]
    for annotation in truth["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", 1600.0)
        annotation["id"] += 1  # pycocotools takes the id 0 for none
    stats = numbers_of_pycocotools(truth, detections).stats.tolist()
    numbers = evaluate_detections(truth, detections)
    assert [getattr(numbers, key) for key in KEYS] == pytest.approx(stats, abs=1e-9)


def test_half_of_two_boxes_found_counts_51_of_101_recalls():
    truth = ground_truth((0, 0, 50, 50), (100, 100, 50, 50))
    numbers = evaluate_detections(truth, [detection(0, 0, 50, 50)])
    assert pytest.approx(51 / 101) == numbers.AP == numbers.APm
    assert numbers.AR100 == 0.5
    assert numbers.per_class["cat"].num_boxes == 2


def test_a_false_alarm_ranked_first_halves_the_precision():
    detections = [detection(0, 0, 50, 50, score=0.5), detection(200, 200, 50, 50, score=0.6)]
    numbers = evaluate_detections(ground_truth((0, 0, 50, 50)), detections)
    assert pytest.approx(0.5) == numbers.AP
    assert numbers.AR1 == 0.0
    assert numbers.AR10 == 1.0


def test_an_overlap_of_three_quarters_counts_at_six_of_ten_thresholds():
    # intersection over union: 75 / 100, so 0.50, 0.55, ..., 0.75
    numbers = evaluate_detections(ground_truth((0, 0, 10, 10)), [detection(0, 0, 10, 7.5)])
    assert pytest.approx(0.6) == numbers.AP == numbers.APs
    assert numbers.AP75 == 1.0


def test_numbers_about_what_the_ground_truth_lacks_are_minus_one():
    numbers = evaluate_detections(ground_truth((0, 0, 50, 50)), [detection(0, 0, 50, 50)])
    assert [numbers.APs, numbers.APl, numbers.ARs, numbers.ARl] == [-1.0] * 4
    assert numbers.per_class["dog"].AP == -1.0
    assert numbers.per_class["dog"].num_boxes == 0
    assert numbers.AP == 1.0, "a class without boxes is no part of the mean"


def test_no_detections_at_all_give_zero():
    numbers = evaluate_detections(ground_truth((0, 0, 50, 50)), [])
    assert [numbers.AP, numbers.AR100, numbers.per_class["cat"].AP] == [0.0] * 3


def test_ground_truth_without_boxes_gives_minus_one():
    assert evaluate_detections(ground_truth(), [detection(0, 0, 5, 5)]).AP == -1.0
    assert evaluate_detections(ground_truth(), []).AP == -1.0


def test_a_detection_on_a_crowd_is_neither_right_nor_wrong():
    truth = ground_truth((0, 0, 50, 50))
    crowd = {"id": 9, "image_id": 1, "category_id": 1, "bbox": [200, 200, 100, 100], "iscrowd": 1}
    truth["annotations"].append(crowd)
    numbers = evaluate_detections(truth, [detection(0, 0, 50, 50, score=0.1), detection(200, 200, 60, 60)])
    assert numbers.AP == 1.0
    assert numbers.per_class["cat"].num_boxes == 1


def test_string_ids_give_what_integer_ids_give():
    truth, detections = random_task(3)
    expected = evaluate_detections(truth, detections)
    renamed = {record["id"]: f"фото/{record['id']:03d}.jpg" for record in truth["images"]}
    truth["images"] = [{"id": renamed[record["id"]]} for record in truth["images"]]
    for record in truth["annotations"] + detections:
        record["image_id"] = renamed[record["image_id"]]
    assert evaluate_detections(truth, detections) == expected


def test_area_and_iscrowd_are_filled_in_where_they_are_missing():
    complete = ground_truth((0, 0, 20, 20), (100, 100, 50, 50), area=None, iscrowd=None)
    for annotation in complete["annotations"]:
        annotation |= {"area": annotation["bbox"][2] * annotation["bbox"][3], "iscrowd": 0}
    bare = ground_truth((0, 0, 20, 20), (100, 100, 50, 50))
    found = [detection(0, 0, 20, 20), detection(100, 100, 50, 30)]
    assert evaluate_detections(bare, found) == evaluate_detections(complete, found)
    assert evaluate_detections(bare, found).APs == 1.0


def test_an_annotation_with_id_zero_counts():
    truth = ground_truth((0, 0, 50, 50))
    assert truth["annotations"][0]["id"] == 0
    assert evaluate_detections(truth, [detection(0, 0, 50, 50)]).AP == 1.0


def test_classes_of_the_same_name_are_both_listed():
    truth = ground_truth((0, 0, 50, 50))
    truth["categories"][1]["name"] = "cat"
    assert list(evaluate_detections(truth, []).per_class) == ["cat (id 1)", "cat (id 2)"]


def test_the_arguments_stay_as_they_are():
    truth, detections = random_task(4)
    before = copy.deepcopy((truth, detections))
    evaluate_detections(truth, detections)
    assert (truth, detections) == before


def test_the_numbers_are_json_with_the_documented_keys():
    numbers = coco_numbers.evaluate_detections(ground_truth((0, 0, 50, 50)), [])
    as_dict = json.loads(json.dumps(numbers.as_dict(), allow_nan=False))
    assert list(as_dict) == ["bbox"]
    assert list(as_dict["bbox"]) == [*KEYS, "per_class"]
    assert list(as_dict["bbox"]["per_class"]["cat"]) == ["AP", "AP50", "AP75", "AR100", "num_boxes"]
    assert Evaluation.from_dict(as_dict) == numbers
    assert numbers.totals() == {"bbox": {key: as_dict["bbox"][key] for key in KEYS}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"score": float("nan")}, r"the detections: \[1\]\.score: expected float .*, here stands nan"),
        ({"score": None}, r"\[1\]\.score: expected float, got null"),
        ({"bbox": [0, 0, float("inf"), 1]}, r"\[1\]\.bbox\[2\]: expected float .*, here stands inf"),
        ({"bbox": [0, 0, 1]}, r"\[1\]\.bbox: expected array of length 4, got 3, here stands \[0, 0, 1\]"),
        ({"bbox": [0, 0, -1, 5]}, r"\[1\]\.bbox\[2\]: expected float >= 0.0, here stands -1"),
        ({"bbox": [0, 0, 5, 10**400]}, r"\[1\]\.bbox\[3\]: number out of range, here stands an integer of 1329 bits"),
        (
            {"image_id": 5},
            r"the detections: \[1\]\.image_id: 5 is unknown; give it an id from the images of the ground truth",
        ),
        ({"image_id": "1"}, "there is 1: write the ids of both the same way"),
        ({"category_id": 77}, r"\[1\]\.category_id: 77 is unknown"),
        ({"category_id": [1]}, r"\[1\]\.category_id: expected .*, got array"),
    ],
)
def test_a_detection_that_cannot_be_evaluated_is_refused_with_its_place(wrong, message):
    detections = [detection(0, 0, 5, 5), detection(0, 0, 5, 5) | wrong]
    with pytest.raises(InputError, match=message) as refused:
        evaluate_detections(ground_truth((0, 0, 50, 50)), detections)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda truth: truth.pop("images"), "the ground truth: object missing required field images"),
        (lambda truth: truth["images"].clear(), "there is no image"),
        (lambda truth: truth["images"].append({"id": 1}), "the image id 1 occurs twice"),
        (lambda truth: truth["categories"].append({"name": "x"}), r"categories\[2\]: object missing required field id"),
        (lambda truth: truth["annotations"][0].pop("bbox"), r"annotations\[0\]: object missing required field bbox"),
        (
            lambda truth: truth["annotations"][0].update(area="big"),
            r"annotations\[0\]\.area: expected float .*, here stands 'big'",
        ),
        (
            lambda truth: truth["annotations"][0].update(iscrowd="no"),
            r"annotations\[0\]\.iscrowd: expected .*, here stands 'no'",
        ),
        (lambda truth: truth["annotations"][0].update(image_id=8), r"annotations\[0\]\.image_id: 8 is unknown"),
    ],
)
def test_ground_truth_that_cannot_be_evaluated_is_refused_with_its_place(change, message):
    truth = ground_truth((0, 0, 50, 50))
    change(truth)
    with pytest.raises(InputError, match=message):
        evaluate_detections(truth, [])


def test_files_that_cannot_be_evaluated_are_refused_by_name(tmp_path):
    truth, detections = tmp_path / "truth.json", tmp_path / "detections.json"
    truth.write_text(json.dumps(ground_truth((0, 0, 50, 50))))
    with pytest.raises(InputError, match=r"detections\.json does not exist"):
        evaluate_files(truth, detections)
    detections.write_text('[{"image_id": 1,\n "categ')
    with pytest.raises(InputError, match=r"detections\.json is not valid JSON: line 2, column 8"):
        evaluate_files(truth, detections)
    with pytest.raises(InputError, match=r"truth\.json: expected array, got object"):
        evaluate_files(truth, truth)
    detections.write_text(json.dumps([detection(0, 0, 50, 50)]))
    with pytest.raises(InputError, match=r"detections\.json: expected object, got array"):
        evaluate_files(detections, detections)
    detections.write_text('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "score": NaN}]')
    with pytest.raises(InputError, match=r"detections\.json is not valid JSON: line 1, column 69"):
        evaluate_files(truth, detections)
    detections.write_text(json.dumps([detection(0, 0, 50, 50)]))
    assert isinstance(evaluate_files(truth, detections), CocoNumbers)
