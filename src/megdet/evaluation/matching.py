"""COCO's counting of boxes, for all images and classes at once in columns of NumPy.

The rules are pycocotools' `COCOeval` to the letter. In each image and class the best-scored detections choose first,
each the ground-truth box of largest overlap that is still free. Pairs of (image, class) know nothing of each other, so
the first choosers of all pairs choose together, then the second ones, and so on; every choice is made for all
thresholds and areas at a time. Only overlaps of at least the lowest threshold take part, which leaves few rounds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64

IOUS = np.linspace(0.5, 0.95, 10)
"""Overlaps from which a detection counts as right."""
RECALLS = np.linspace(0, 1, 101)
"""Where precision is read."""
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])
"""All, small, medium and large objects in square pixels; both ends belong to it."""
MAX_DETECTIONS = (1, 10, 100)
"""Best detections of an image and class that count for recall; for precision it is the last."""
_MAX_PAIRS = 1 << 18  # (detection, ground-truth box) looked at together: a limit of memory

Precision = Float[np.ndarray, "ious classes areas"]
Recall = Float[np.ndarray, "ious classes areas max_detections"]
_Choices = Bool[np.ndarray, "detections areas ious"]


@dataclass(frozen=True)
class TruthColumns:
    """Ground-truth boxes, one a row; images and classes are numbered from 0."""

    images: Int64[np.ndarray, " truths"]
    classes: Int64[np.ndarray, " truths"]
    boxes: Float[np.ndarray, "truths 4"]
    """x, y, width, height in pixels"""
    areas: Float[np.ndarray, " truths"]
    """square pixels of the object"""
    is_crowd: Bool[np.ndarray, " truths"]

    def __getitem__(self, rows: Int64[np.ndarray, " rows"]) -> "TruthColumns":
        return TruthColumns(
            self.images[rows], self.classes[rows], self.boxes[rows], self.areas[rows], self.is_crowd[rows]
        )


@dataclass(frozen=True)
class DetectionColumns:
    """Detections, one a row; images and classes are numbered as in the ground truth."""

    images: Int64[np.ndarray, " detections"]
    classes: Int64[np.ndarray, " detections"]
    boxes: Float[np.ndarray, "detections 4"]
    """x, y, width, height in pixels"""
    scores: Float[np.ndarray, " detections"]

    def __getitem__(self, rows: Int64[np.ndarray, " rows"]) -> "DetectionColumns":
        return DetectionColumns(self.images[rows], self.classes[rows], self.boxes[rows], self.scores[rows])


def precision_and_recall(truth: TruthColumns, found: DetectionColumns, num_classes: int) -> tuple[Precision, Recall]:
    """The mean of the precision at 101 recalls, and recall; -1 where a class has no object of the area.

    Equal scores are ranked by image, then in the order given.
    """
    truth = truth[np.lexsort((truth.images, truth.classes))]  # stable: within an image and class the order given
    found = found[np.lexsort((-found.scores, found.images, found.classes))]
    starts = _starts(found.images, found.classes)
    rank = np.arange(len(found.scores)) - np.repeat(starts[:-1], np.diff(starts))
    kept = np.flatnonzero(rank < MAX_DETECTIONS[-1])
    found, rank = found[kept], rank[kept]

    is_ignored = truth.is_crowd[:, None] | _is_outside(truth.areas)
    is_right, is_wrong = _judge(truth, is_ignored, found)
    class_of, areas = truth.classes, range(len(AREAS))
    num_truths = np.stack(
        [np.bincount(class_of[~is_ignored[:, area]], minlength=num_classes) for area in areas], axis=1
    )
    by_score = np.lexsort((-found.scores, found.classes))  # stable: equal scores in the order of their images
    classes, rank = found.classes[by_score], rank[by_score]
    precision = np.zeros((len(IOUS), num_classes, len(AREAS)))
    recall = np.zeros((*precision.shape, len(MAX_DETECTIONS)))
    for area in areas:
        # the hits of one overlap and class stand together, the best scores first
        iou, row = np.nonzero(is_right[by_score, area].T)
        curve = iou * num_classes + classes[row]
        hits, counted = _running_counts(is_right[by_score, area], is_wrong[by_score, area], classes, iou, row)
        truths = num_truths[classes[row], area]
        read = _recalls_up_to(hits, truths) - np.where(hits > 1, _recalls_up_to(hits - 1, truths), 0)
        reached = _highest_from_here_on(hits / counted, curve) * read
        shape = precision.shape[:2]
        size = math.prod(shape)
        precision[..., area] = np.bincount(curve, reached, size).reshape(shape) / len(RECALLS)
        for column, most in enumerate(MAX_DETECTIONS):
            counts = np.bincount(curve[rank[row] < most], minlength=size)
            recall[..., area, column] = counts.reshape(shape)
    recall /= np.maximum(num_truths, 1)[..., None]
    precision[:, num_truths == 0] = -1
    recall[:, num_truths == 0] = -1
    return precision, recall


def _running_counts(
    is_right: Bool[np.ndarray, "detections ious"],
    is_wrong: Bool[np.ndarray, "detections ious"],
    classes: Int64[np.ndarray, " detections"],
    iou: Int64[np.ndarray, " hits"],
    row: Int64[np.ndarray, " hits"],
) -> tuple[Int64[np.ndarray, " hits"], Int64[np.ndarray, " hits"]]:
    """At each hit, how many of its class are right up to it, and how many are right or wrong."""
    start = np.searchsorted(classes, classes[row])
    before = np.zeros((len(classes) + 1, len(IOUS)), np.int64)
    counts = []
    for counted in (is_right, is_right | is_wrong):
        np.cumsum(counted, axis=0, out=before[1:])
        counts.append(before[row + 1, iou] - before[start, iou])
    return counts[0], counts[1]


def _recalls_up_to(hits: Int64[np.ndarray, " hits"], truths: Int64[np.ndarray, " hits"]) -> Int64[np.ndarray, " hits"]:
    """How many of the 101 recalls so many hits reach."""
    count: Int64[np.ndarray, " hits"] = np.searchsorted(RECALLS, hits / truths, side="right")
    return count


def _highest_from_here_on(
    values: Float[np.ndarray, " hits"], curve: Int64[np.ndarray, " hits"]
) -> Float[np.ndarray, " hits"]:
    """The highest value of the same curve at each place or behind it; curves stand in ascending order."""
    levels, level = np.unique(values, return_inverse=True)
    # whole numbers that rise from curve to curve backwards, so that one running maximum serves all curves
    keys = level + len(levels) * (curve.max(initial=0) - curve)
    highest: Float[np.ndarray, " hits"] = levels[np.maximum.accumulate(keys[::-1])[::-1] % max(len(levels), 1)]
    return highest


def _starts(images: Int64[np.ndarray, " rows"], classes: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " runs"]:
    """Where each run of one image and class begins, and the end."""
    is_new = np.ones(len(images) + 1, np.bool_)
    is_new[1:-1] = (images[1:] != images[:-1]) | (classes[1:] != classes[:-1])
    return np.flatnonzero(is_new) if len(images) else np.zeros(1, np.int64)


def _is_outside(areas: Float[np.ndarray, " rows"]) -> Bool[np.ndarray, "rows areas"]:
    return (areas[:, None] < AREAS[:, 0]) | (areas[:, None] > AREAS[:, 1])


def _judge(
    truth: TruthColumns, is_ignored: Bool[np.ndarray, "truths areas"], found: DetectionColumns
) -> tuple[_Choices, _Choices]:
    """Which detections are right, and which wrong; one that matches what is ignored is neither."""
    outside = _is_outside(found.boxes[:, 2] * found.boxes[:, 3])
    is_right = np.zeros((*outside.shape, len(IOUS)), np.bool_)
    is_wrong = np.repeat(~outside[:, :, None], len(IOUS), axis=2)
    is_taken = np.zeros((*is_ignored.shape, len(IOUS)), np.bool_)
    for choosers, chosen, overlaps in _rounds(truth, found):
        can = ~is_taken[chosen] | truth.is_crowd[chosen, None, None]
        can &= overlaps[:, None, None] >= IOUS
        # what is ignored comes after all else; then the larger overlap, at the end of a chooser's rows
        worth = np.arange(1, len(chosen) + 1)[:, None] + len(chosen) * ~is_ignored[chosen]
        first = np.flatnonzero(np.diff(choosers, prepend=-1))
        best = np.maximum.reduceat(np.where(can, worth[:, :, None], 0), first)
        chooser, area, iou = np.nonzero(best)
        value = best[chooser, area, iou]
        detection = choosers[first[chooser]]
        is_taken[chosen[(value - 1) % len(chosen)], area, iou] = True
        is_right[detection, area, iou] = value > len(chosen)
        is_wrong[detection, area, iou] = False
    return is_right, is_wrong


def _rounds(
    truth: TruthColumns, found: DetectionColumns
) -> Iterator[tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]]:
    """Pairs (detection, ground-truth box) with their overlap, of at most one detection an image and class at a time.

    Rows of one detection stand together, from the least overlap to the largest, equal ones in the order given.
    """
    num_images = 1 + max(truth.images.max(initial=0), found.images.max(initial=0))
    truth_keys, found_keys = (side.classes * num_images + side.images for side in (truth, found))
    first = np.searchsorted(truth_keys, found_keys)
    counts = np.searchsorted(truth_keys, found_keys, side="right") - first
    starts = _starts(found.images, found.classes)
    pairs_before = np.concatenate([[0], np.cumsum(counts)])[starts]
    begin = 0
    while begin < len(starts) - 1:
        # as many images and classes together as the limit allows, at least one
        end = max(begin + 1, int(np.searchsorted(pairs_before, pairs_before[begin] + _MAX_PAIRS, side="right")) - 1)
        rows = np.arange(starts[begin], starts[end])
        begin = end
        choosers = np.repeat(rows, counts[rows])
        within = np.arange(len(choosers)) - np.repeat(np.cumsum(counts[rows]) - counts[rows], counts[rows])
        chosen = first[choosers] + within
        overlaps = _overlaps(found.boxes[choosers], truth.boxes[chosen], truth.is_crowd[chosen])
        near = np.flatnonzero(overlaps >= IOUS[0])
        choosers, chosen, overlaps = choosers[near], chosen[near], overlaps[near]
        own, place = np.unique(choosers, return_inverse=True)
        runs = _starts(found.images[own], found.classes[own])
        turns = (np.arange(len(own)) - np.repeat(runs[:-1], np.diff(runs)))[place]
        order = np.lexsort((chosen, overlaps, choosers, turns))
        for turn in np.split(order, np.flatnonzero(np.diff(turns[order])) + 1):
            if len(turn):
                yield choosers[turn], chosen[turn], overlaps[turn]


def _overlaps(
    found: Float[np.ndarray, "pairs 4"], truth: Float[np.ndarray, "pairs 4"], is_crowd: Bool[np.ndarray, " pairs"]
) -> Float[np.ndarray, " pairs"]:
    """Intersection over union; in a crowd over the detection alone."""
    sides = np.minimum(found[:, :2] + found[:, 2:], truth[:, :2] + truth[:, 2:]) - np.maximum(
        found[:, :2], truth[:, :2]
    )
    meets = (sides > 0).all(axis=1)
    both = sides[:, 0] * sides[:, 1]
    own = found[:, 2] * found[:, 3]
    union = np.where(is_crowd, own, own + truth[:, 2] * truth[:, 3] - both)
    overlaps: Float[np.ndarray, " pairs"] = np.divide(both, union, out=np.zeros_like(both), where=meets)
    return overlaps
