"""The confusion matrix at IoU 0.5 and a score threshold."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from hotcoco import mask as coco_masks
from jaxtyping import Float64, Int64

from megdet.evaluation.counting import Objects
from megdet.evaluation.matches import ClassMatches
from megdet.evaluation.task import Sides

_OVERLAP = 0.5


def confusion_matrix(
    sides: Sides, classes: Sequence[ClassMatches], threshold: float
) -> Int64[np.ndarray, "truths founds"]:
    """The number of objects of the row's class that were found as the column's class.

    The last column counts missed objects, the last row detections of nothing. Detections of at least `threshold` count.
    Detections of the right class take their objects first, as COCO matches them. Each detection left over, best score
    first, takes the object of another class with which it has the largest IoU of 0.5 or more. Detections on a crowd of
    their class do not count.
    """
    truth, found, count = sides.truth, sides.found, len(classes)
    matrix = np.zeros((count + 1, count + 1), np.int64)
    is_free = ~truth.is_crowd
    left_over: list[int] = []
    for label, own in enumerate(classes):
        is_shown = (own.scores >= threshold) & own.is_counted[:, 0]
        right = is_shown & own.is_right[:, 0]
        matrix[label, label] = right.sum()
        is_free[own.partners[right]] = False
        left_over += own.rows[is_shown & ~own.is_right[:, 0]].tolist()
    objects = _by_image(truth, np.flatnonzero(is_free).tolist())
    wrong = _by_image(found, sorted(left_over, key=lambda row: (-found.scores[row], row)))
    for image, rows in wrong.items():
        for row, partner in zip(rows, _partners(sides, rows, objects.get(image, [])), strict=True):
            matrix[count if partner is None else truth.classes[partner], found.classes[row]] += 1
            if partner is not None:
                is_free[partner] = False
    np.add.at(matrix[:, count], truth.classes[is_free], 1)
    return matrix


def _partners(sides: Sides, rows: list[int], objects: list[int]) -> list[int | None]:
    """The object that each unmatched detection takes, if any; it is of another class."""
    if not objects:
        return [None] * len(rows)
    overlaps = _overlaps(sides, rows, objects)
    partners: list[int | None] = []
    for own in overlaps:
        best = int(own.argmax())
        is_near = own[best] >= _OVERLAP
        partners.append(objects[best] if is_near else None)
        if is_near:
            overlaps[:, best] = 0.0
    return partners


def _overlaps(sides: Sides, rows: list[int], objects: list[int]) -> Float64[np.ndarray, "detections objects"]:
    truth, found = sides.truth, sides.found
    no_crowd = [False] * len(objects)
    if truth.masks is None or found.masks is None:
        return np.array(coco_masks.iou(found.boxes[rows], truth.boxes[objects], no_crowd))
    masks = [found.masks[row] for row in rows], [truth.masks[row] for row in objects]
    return np.array(coco_masks.iou(*masks, no_crowd))


def _by_image(objects: Objects, rows: list[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        found[int(objects.images[row])].append(row)
    return found
