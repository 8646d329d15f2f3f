"""Which detections are right: COCO's matching of every class, in columns that are cheap to count again.

AP is not a mean over images. AP on other images (`resampling`), numbers at other thresholds (`thresholds`) or for each
image (`per_image`) are counted from these columns, without matching again.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

from megdet.evaluation.counting import Kind, matched
from megdet.evaluation.task import Sides

OVERLAPS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""COCO's ten IoUs from which a detection is right."""


@dataclass(frozen=True)
class ClassMatches:
    """The detections of one class, the best score first, equal scores in the order of images and rows.

    Detections beyond the 100 best of an image and class are left out, as in COCO. Detections on a crowd are included,
    but not counted.
    """

    rows: Int64[np.ndarray, " detections"]
    """rows in the columns of the detections"""
    images: Int64[np.ndarray, " detections"]
    scores: Float[np.ndarray, " detections"]
    is_counted: Bool[np.ndarray, "detections 10"]
    """for each of `OVERLAPS`: whether the detection is not on a crowd"""
    is_right: Bool[np.ndarray, "detections 10"]
    """whether the detection has found an object"""
    partners: Int64[np.ndarray, " detections"]
    """row of the object found at IoU 0.5 in the ground truth, -1 if there is none"""
    objects: Int64[np.ndarray, " images"]
    """number of objects of each image, without crowds"""


def match(sides: Sides, num_images: int, num_classes: int, kind: Kind) -> list[ClassMatches]:
    """COCO's matching, class by class, as pycocotools does it: the best detection first, each object once."""
    truth, found = sides.truth, sides.found
    evaluated = matched(truth, found, range(num_classes), kind)
    is_counted, is_right = np.zeros((2, len(found.classes), len(OVERLAPS)), np.bool_)
    partners = np.full(len(found.classes), -1)
    for place, overlap in enumerate(OVERLAPS):
        told = evaluated.image_diagnostics(iou_thr=overlap, score_thr=2.0)  # score_thr > 1: no list of doubtful labels
        states = told["dt_status"]
        rows = np.fromiter(states, np.int64, len(states)) - 1
        is_counted[rows, place] = True
        is_right[rows, place] = [state == "tp" for state in states.values()]
        if place == 0:
            pairs = told["dt_match"]
            partners[np.fromiter(pairs, np.int64, len(pairs)) - 1] = np.fromiter(pairs.values(), np.int64) - 1
    order = np.lexsort((np.arange(len(found.scores)), found.images, -found.scores))
    order = order[is_counted[order].any(axis=1)]
    ends = np.searchsorted(np.sort(found.classes[order]), np.arange(num_classes + 1))
    order = order[np.argsort(found.classes[order], kind="stable")]
    objects = _objects(sides, num_images, num_classes)
    return [
        ClassMatches(
            rows,
            found.images[rows],
            found.scores[rows],
            is_counted[rows],
            is_right[rows],
            np.where(is_right[rows, 0], partners[rows], -1),
            objects[label],
        )
        for label in range(num_classes)
        for rows in [order[ends[label] : ends[label + 1]]]
    ]


def _objects(sides: Sides, num_images: int, num_classes: int) -> Int[np.ndarray, "classes images"]:
    truth = sides.truth
    rows = np.flatnonzero(~truth.is_crowd)
    places = truth.classes[rows] * num_images + truth.images[rows]
    return np.bincount(places, minlength=num_classes * num_images).reshape(num_classes, num_images)
