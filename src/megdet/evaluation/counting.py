"""COCO's evaluation of boxes and of masks, by hotcoco.

hotcoco gives pycocotools' numbers bit for bit, and takes less time and memory than our former code in NumPy, which had
no masks (`docs/benchmarks.md`). Of other evaluators, vernier depends on pyarrow, faster-coco-eval takes eight times as
long, and ultrafast-pycocotools, equally fast, calls itself an alpha.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from hotcoco import COCO, COCOeval
from jaxtyping import Bool, Float, Int64

MAX_DETECTIONS = (1, 10, 100)
"""Numbers of best detections, for each image and class, at which recall is computed; precision uses the last."""
_MOST_CLASSES = 1 << 9  # counted together: the curves of all of them are in memory

Kind = Literal["bbox", "segm"]
"""Whether IoU is that of boxes or of masks."""
Precision = Float[np.ndarray, "ious classes areas"]
Recall = Float[np.ndarray, "ious classes areas max_detections"]
_O = TypeVar("_O", bound="Objects")


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Objects of all images, one a row; images and classes are numbered from 0."""

    images: Int64[np.ndarray, " rows"]
    classes: Int64[np.ndarray, " rows"]
    boxes: Float[np.ndarray, "rows 4"]
    """x, y, width, height in pixels"""
    areas: Float[np.ndarray, " rows"]
    """square pixels of the object"""
    masks: list[Any] | None = None
    """masks, each a `Rle` of `data.rle`; None if only boxes are evaluated"""

    def of_classes(self: _O, classes: range) -> _O:
        """The objects of a range of classes, in the same order."""
        rows = np.flatnonzero((self.classes >= classes.start) & (self.classes < classes.stop))
        if len(rows) == len(self.classes):
            return self
        columns = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(
            self, **columns, masks=None if self.masks is None else [self.masks[row] for row in rows.tolist()]
        )


@dataclass(frozen=True, kw_only=True)
class TruthColumns(Objects):
    """The ground truth."""

    is_crowd: Bool[np.ndarray, " rows"]


@dataclass(frozen=True, kw_only=True)
class DetectionColumns(Objects):
    """Detections; images and classes are numbered as in the ground truth."""

    scores: Float[np.ndarray, " rows"]


def precision_and_recall(
    truth: TruthColumns, found: DetectionColumns, num_classes: int, kind: Kind
) -> tuple[Precision, Recall]:
    """The mean of the precision at 101 recalls, and recall; -1 if a class has no object of the area.

    Overlaps are 0.50, 0.55, ..., 0.95; areas all, up to 32^2 square pixels, from there to 96^2, and from there on.
    Equal scores are ranked by image, then in the order given.
    """
    parts = []
    for first in range(0, num_classes, _MOST_CLASSES):
        classes = range(first, min(first + _MOST_CLASSES, num_classes))
        parts.append(_count(truth.of_classes(classes), found.of_classes(classes), classes, kind))
    precisions, recalls = zip(*parts, strict=True)
    return np.concatenate(precisions, axis=1), np.concatenate(recalls, axis=1)


def _count(truth: TruthColumns, found: DetectionColumns, classes: range, kind: Kind) -> tuple[Precision, Recall]:
    """`precision_and_recall` for a range of classes."""
    counted = matched(truth, found, classes, kind)
    counted.accumulate()
    curves = counted.eval or {}
    return curves["precision"][..., -1].mean(axis=1), curves["recall"]


def matched(truth: TruthColumns, found: DetectionColumns, classes: range, kind: Kind) -> COCOeval:
    """hotcoco's evaluator after matching the columns of some classes; the ids of both sides are 1 + their row."""
    num_images = 1 + int(max(truth.images.max(initial=0), found.images.max(initial=0)))
    target = COCO.from_arrays(
        [{"id": image} for image in range(num_images)],
        [{"id": label, "name": str(label)} for label in classes],
        truth.images,
        truth.classes,
        truth.boxes,
        area=truth.areas,
        iscrowd=truth.is_crowd,
        segmentation=truth.masks,
    )
    rows = np.column_stack([found.images, found.boxes, found.scores, found.classes])
    results = target.load_res(rows, segmentation=found.masks)
    results.update_anns(ids=np.arange(1, len(rows) + 1), area=found.areas)
    counted = COCOeval(target, results, kind)
    counted.evaluate()
    return counted
