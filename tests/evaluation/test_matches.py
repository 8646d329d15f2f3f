"""The matched detections, counted again: AP, AP of other images, thresholds, F1 of an image."""

import numpy as np
import pytest

from coco_tasks import detection, ground_truth, random_task
from megdet.evaluation.coco_numbers import evaluate_task
from megdet.evaluation.matches import ClassMatches, match
from megdet.evaluation.per_image import image_counts
from megdet.evaluation.resampling import average_precisions, draw_images, interval, mean_ap
from megdet.evaluation.task import Task, read_task
from megdet.evaluation.thresholds import curve

HERE, ELSEWHERE = (0, 0, 10, 10), (500, 500, 10, 10)


def matches_of(task: Task) -> list[ClassMatches]:
    return match(task.boxes, len(task.image_ids), len(task.class_names), "bbox")


def counted(truth, detections) -> list[ClassMatches]:
    return matches_of(read_task(truth, detections))


@pytest.mark.parametrize("seed", range(8))
def test_where_every_image_counts_once_ap_is_that_of_coco(seed):
    task = read_task(*random_task(seed))
    numbers = evaluate_task(task).bbox
    found = average_precisions(matches_of(task), np.ones((1, 6), np.int32))[0]
    for of_class, ours in zip(numbers.per_class.values(), found, strict=True):
        assert (of_class.AP == -1) == np.isnan(ours).all()
        if of_class.AP != -1:
            assert [ours.mean(), ours[0], ours[5]] == pytest.approx([of_class.AP, of_class.AP50, of_class.AP75])
    assert mean_ap(found[None])[0] == pytest.approx(numbers.AP)


def repeated(truth, detections, times: dict[int, int]):
    """The same task with every image so many times, copies beside each other in the order of ids."""

    def copies(rows, key):
        return [
            row | {key: 1000 * row[key] + copy} | ({"id": 10_000 * row["id"] + copy} if key == "image_id" else {})
            for row in ({"id": index} | row for index, row in enumerate(rows, 1))
            for copy in range(times[row[key]])
        ]

    annotations, found = (copies(rows, "image_id") for rows in (truth["annotations"], detections))
    return truth | {"images": copies(truth["images"], "id"), "annotations": annotations}, found


@pytest.mark.parametrize("seed", range(8))
def test_an_image_that_counts_k_times_counts_like_k_copies_of_it(seed):
    truth, detections = random_task(seed)
    scores = np.random.default_rng(seed).permutation(len(detections)) / 1000  # ties would be ranked by the copies
    detections = [row | {"score": float(score)} for row, score in zip(detections, scores, strict=True)]
    task = read_task(truth, detections)
    weights = draw_images(6, 3, seed)
    found = average_precisions(matches_of(task), weights)
    for row, own in zip(weights, found, strict=True):
        copied = read_task(*repeated(truth, detections, dict(zip(task.image_ids, row.tolist(), strict=True))))
        assert mean_ap(own[None])[0] == pytest.approx(evaluate_task(copied).bbox.AP)


def test_a_resample_has_as_many_images_and_every_seed_its_own():
    drawn = draw_images(7, 50, seed=1)
    assert (drawn.sum(axis=1) == 7).all()
    assert (drawn == draw_images(7, 50, seed=1)).all()
    assert (drawn != draw_images(7, 50, seed=2)).any()


def test_the_interval_is_the_middle_of_the_resamples_without_those_that_have_no_object():
    assert interval(np.array([np.nan, *range(101)]), 0.9) == pytest.approx((5.0, 95.0))
    assert np.isnan(interval(np.array([np.nan]))).all()


def test_precision_recall_and_f1_of_every_threshold_by_hand():
    truth = ground_truth(HERE, (100, 0, 10, 10), (200, 0, 10, 10))
    found = [
        detection(*HERE, score=0.9),
        detection(*ELSEWHERE, score=0.8),
        detection(100, 0, 10, 10, score=0.7),
        detection(600, 0, 10, 10, score=0.7),
        detection(200, 0, 10, 10, score=0.2),
    ]
    cats = curve(counted(truth, found)[:1])
    assert cats.thresholds.tolist() == [0.9, 0.8, 0.7, 0.2]  # both of 0.7 are shown together
    assert cats.precision.tolist() == [1, 1 / 2, 2 / 4, 3 / 5]
    assert cats.recall.tolist() == [1 / 3, 1 / 3, 2 / 3, 1]
    assert cats.f1.tolist() == [2 / 4, 2 / 5, 4 / 7, 6 / 8]
    assert cats.best_f1() == cats.point(3)
    assert cats.at_precision(0.9) == cats.point(0)
    assert cats.at_precision(0.55) == cats.point(3)  # the lowest threshold, which finds most


def test_a_class_of_which_nothing_is_right_has_no_threshold():
    cats = curve(counted(ground_truth(HERE), [detection(*ELSEWHERE)])[:1])
    assert cats.best_f1() is None
    assert cats.at_precision(0.0) is None
    assert curve(counted(ground_truth(HERE), [])).best_f1() is None


def test_what_lies_on_a_crowd_is_neither_right_nor_wrong():
    truth = ground_truth(HERE, iscrowd=1)
    truth["annotations"] += ground_truth((100, 0, 10, 10))["annotations"]
    truth["annotations"][1]["id"] = 7
    found = counted(truth, [detection(*HERE, score=0.9), detection(100, 0, 10, 10, score=0.5)])
    cats = curve(found[:1])
    assert (cats.thresholds.tolist(), cats.precision.tolist(), cats.objects) == ([0.5], [1.0], 1)
    assert image_counts(found, 0.1).wrong.tolist() == [0]


@pytest.mark.parametrize("seed", range(4))
def test_a_drawn_curve_keeps_its_ends_and_its_best_thresholds(seed):
    every = curve(counted(*random_task(seed, num_detections=400)))
    kept = every.spread(8)
    assert {0, len(every.thresholds) - 1} <= {*kept.tolist()}
    best = every.best_f1()
    assert best is not None
    assert best.threshold in every.thresholds[kept]
    assert len(kept) <= 8 + 4


def test_the_worst_image_has_the_lowest_f1_and_the_best_most_objects():
    truth, found = ground_truth(), []
    truth["images"] = [{"id": 1}, {"id": 2}, {"id": 3}, {"id": 4}]
    for image, boxes in ((1, 2), (2, 1), (3, 2)):
        truth["annotations"] += ground_truth(*((100 * i, 0, 10, 10) for i in range(boxes)), image_id=image)[
            "annotations"
        ]
    for index, row in enumerate(truth["annotations"]):
        row["id"] = index
    found += [detection(0, 0, 10, 10, image_id=1), detection(100, 0, 10, 10, image_id=1)]  # F1 1
    found += [detection(0, 0, 10, 10, image_id=2), detection(*ELSEWHERE, image_id=2)]  # F1 2/3
    found += [detection(*ELSEWHERE, image_id=3, score=0.4)]  # F1 0; shown from 0.4 on
    counts = image_counts(counted(truth, found), 0.5)
    assert counts.f1.tolist() == pytest.approx([1, 2 / 3, 0, 1])  # nothing to find, nothing shown
    assert counts.worst(9) == [2, 1]
    assert counts.best(9) == [0, 1]
    assert image_counts(counted(truth, found), 0.3).wrong.tolist() == [0, 1, 1, 0]
