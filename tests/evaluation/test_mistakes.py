"""The confusion matrix and the kinds of mistakes, by hand."""

import numpy as np
import pytest

from coco_tasks import detection, ground_truth, random_task
from megdet.data.rle import encode_mask
from megdet.evaluation.confusion import confusion_matrix
from megdet.evaluation.error_kinds import MEANING, error_kinds
from megdet.evaluation.matches import match
from megdet.evaluation.task import read_task

HERE, ELSEWHERE = (0, 0, 10, 10), (500, 500, 10, 10)
CAT, DOG = 1, 2


def matrix_of(truth, found, threshold=0.0, kind="bbox"):
    task = read_task(truth, found)
    sides = task.boxes if kind == "bbox" else task.masks
    matches = match(sides, len(task.image_ids), len(task.class_names), kind)
    return confusion_matrix(sides, matches, threshold).tolist()


def test_found_missed_taken_for_another_and_nothing_there():
    truth = ground_truth(HERE, (100, 0, 10, 10), (200, 0, 10, 10))
    found = [
        detection(*HERE),
        detection(100, 0, 10, 10, category_id=DOG),
        detection(*ELSEWHERE),
        detection(600, 0, 9, 9, category_id=DOG),
    ]
    assert matrix_of(truth, found) == [[1, 1, 1], [0, 0, 0], [1, 1, 0]]


def test_a_detection_below_the_threshold_leaves_its_object_missed():
    assert matrix_of(ground_truth(HERE), [detection(*HERE, score=0.3)], 0.4) == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_the_right_class_takes_an_object_before_a_wrong_one_of_a_higher_score():
    found = [detection(*HERE, category_id=DOG, score=0.9), detection(*HERE, score=0.5)]
    assert matrix_of(ground_truth(HERE), found) == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_a_second_detection_of_an_object_finds_nothing():
    assert matrix_of(ground_truth(HERE), [detection(*HERE), detection(*HERE, score=0.5)])[2] == [1, 0, 0]


def test_one_object_is_taken_for_another_class_once():
    found = [detection(*HERE, category_id=DOG, score=score) for score in (0.9, 0.8)]
    assert matrix_of(ground_truth(HERE), found) == [[0, 1, 0], [0, 0, 0], [0, 1, 0]]


def test_a_detection_on_a_crowd_of_its_class_counts_nowhere():
    assert matrix_of(ground_truth(HERE, iscrowd=1), [detection(*HERE)]) == np.zeros((3, 3)).tolist()


def test_masks_are_confused_by_their_masks():
    halves = np.ones((4, 10), np.bool_)
    above, below = encode_mask(halves, 0, 0, (10, 10)), encode_mask(halves, 0, 6, (10, 10))
    truth = ground_truth(HERE, segmentation=above)
    truth["images"][0] |= {"width": 10, "height": 10}
    found = [detection(*HERE, category_id=DOG) | {"segmentation": mask} for mask in (below, above)]
    assert matrix_of(truth, found, kind="segm") == [[0, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert matrix_of(truth, found[:1], kind="segm") == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert matrix_of(truth, found[:1], kind="bbox") == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(4))
def test_rows_count_the_objects_and_columns_the_detections(seed):
    truth, found = random_task(seed)
    matrix = np.array(matrix_of(truth, found, 0.35))
    objects = [
        sum(a["category_id"] == c["id"] and not a["iscrowd"] for a in truth["annotations"]) for c in truth["categories"]
    ]
    assert matrix[:-1].sum(axis=1).tolist() == objects
    shown = [sum(f["category_id"] == c["id"] and f["score"] >= 0.35 for f in found) for c in truth["categories"]]
    assert (matrix.sum(axis=0)[:-1] <= shown).all()  # some lie on crowds


def kinds_of(truth, found):
    task = read_task(truth, found)
    kinds = error_kinds(task.boxes, len(task.class_names), "bbox")
    assert [kind.name for kind in kinds] == list(MEANING)
    return {kind.name: (kind.count, kind.cost) for kind in kinds if kind.count}


def test_a_box_of_half_the_place_costs_what_its_object_is_worth():
    assert kinds_of(ground_truth(HERE), [detection(0, 0, 10, 4)]) == {"localisation": (1, pytest.approx(1.0))}


def test_a_wrong_class_of_a_missed_object_is_mended_by_the_right_one():
    assert kinds_of(ground_truth(HERE), [detection(*HERE, category_id=DOG)]) == {
        "classification": (1, pytest.approx(1.0))
    }


def test_what_is_there_alone_before_what_is_right_halves_the_precision():
    """One object, found second: AP50 is 1/2, and 1 without the first detection."""
    assert kinds_of(ground_truth(HERE), [detection(*ELSEWHERE), detection(*HERE, score=0.5)]) == {
        "background": (1, pytest.approx(0.5))
    }


def test_a_missed_object_of_two_costs_half():
    """Recall ends at 1/2, where 51 of the 101 points are."""
    assert kinds_of(ground_truth(HERE, ELSEWHERE), [detection(*HERE)]) == {"missed": (1, pytest.approx(50 / 101))}


def test_a_duplicate_between_two_right_ones_costs_precision():
    """Right, duplicate, right: precision 1 up to recall 1/2, then 2/3."""
    truth = ground_truth(HERE, ELSEWHERE)
    found = [detection(*HERE), detection(*HERE, score=0.8), detection(*ELSEWHERE, score=0.5)]
    assert kinds_of(truth, found) == {"duplicate": (1, pytest.approx(50 / 101 / 3))}


def test_the_wrong_class_in_half_the_wrong_place_is_both():
    found = [detection(0, 0, 10, 4, category_id=DOG)]
    assert kinds_of(ground_truth(HERE), found) == {"both": (1, 0.0), "missed": (1, 0.0)}
