"""The COCO numbers of boxes and of masks: twelve for the data set and some for every class.

The data set and the detections are checked and put into columns (`columns`, `masks`), and counted by hotcoco
(`counting`): pycocotools' numbers, many times as fast. It is quiet, and the caller's dicts stay as they are.

Differs from pycocotools where that goes wrong: string ids work, an annotation with id 0 counts like any other, `area`
and `iscrowd` may be missing (width x height or the pixels of the mask, and 0), no detections at all give 0, and invalid
input (an unknown image, a score that is not finite) is refused with its place instead of giving a wrong number or an
assertion.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from megdet.evaluation.counting import MAX_DETECTIONS, Kind, Precision, Recall, precision_and_recall
from megdet.evaluation.task import Sides, Task, read_task
from megdet.files import typed

_DIGITS = 12
"""Decimal places that numbers are rounded to: a perfect score is 1, not 1 - 2e-16 as in pycocotools."""


@dataclass(frozen=True)
class ClassNumbers:
    """The numbers of one class, each in 0..1, or -1 if the class has no box in the ground truth.

    `num_boxes` counts its ground-truth boxes, crowds excluded.
    """

    AP: float
    AP50: float
    AP75: float
    AR100: float
    num_boxes: int


@dataclass(frozen=True)
class CocoNumbers:
    """The twelve COCO numbers (0..1) and those of every class.

    AP is the mean over IoU 0.50:0.05:0.95 and the classes (the paper's mmAP), AR100 the recall at up to 100 detections
    an image (its mmAR). s, m and l are objects of an area below 32^2, up to 96^2 and above. A number is -1 if the
    ground truth has no such object, as with pycocotools.
    """

    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    AR1: float
    AR10: float
    AR100: float
    ARs: float
    ARm: float
    ARl: float
    per_class: dict[str, ClassNumbers]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields by name, and `per_class` as name -> {AP, AP50, AP75, AR100, num_boxes}."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the evaluation") -> "CocoNumbers":
        """Inverse of `as_dict`. Raises InputError, naming `source`, where a number is missing or of another kind."""
        return typed(values, cls, source)


@dataclass(frozen=True)
class Evaluation:
    """The numbers of detections: by the IoU of boxes and, if there are masks, by the IoU of masks."""

    bbox: CocoNumbers
    segm: CocoNumbers | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, under COCO's names: `bbox` and, if there are masks, `segm`."""
        return {kind: own.as_dict() for kind, own in (("bbox", self.bbox), ("segm", self.segm)) if own is not None}

    def totals(self) -> dict[str, dict[str, float]]:
        """For JSON, without the numbers of the classes."""
        return {
            kind: {key: value for key, value in own.items() if key != "per_class"}
            for kind, own in self.as_dict().items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the evaluation") -> "Evaluation":
        """Inverse of `as_dict`. Raises InputError, naming `source`, where a number is missing or of another kind."""
        return typed(values, cls, source)


def evaluate_files(ground_truth: Path, detections: Path) -> Evaluation:
    """The numbers of a COCO result file against a COCO instances file; also of masks if the results have masks.

    Raises:
        InputError: a file is missing, corrupt, or not of its format.
    """
    return evaluate_task(read_task(ground_truth, detections))


def evaluate_detections(
    ground_truth: Path | dict[str, Any], detections: list[dict[str, Any]], *, has_masks: bool = False
) -> Evaluation:
    """The numbers of detections against ground truth in the COCO instances format.

    Args:
        ground_truth: a file or its content: `images`, `categories`, `annotations`; boxes are x, y, width, height in
            pixels.
        detections: {image_id, category_id, bbox, score} each, with the ids of the ground truth; ties of the score go to
            the earlier one. If one has a `segmentation` of run lengths (`data.rle`), all need one, and so do the
            annotations: run lengths or polygons. Then a detection may do without `bbox`.
        has_masks: count masks even if there is no detection.

    Raises:
        InputError: the file is missing or corrupt; an id is unknown or occurs twice; a box or score is not finite, or a
            box has a negative size; a mask is missing, broken or not of the size of its image.
    """
    return evaluate_task(read_task(ground_truth, detections, has_masks=has_masks))


def evaluate_task(task: Task) -> Evaluation:
    """The numbers of a task, whose ground truth and detections are already read."""
    return Evaluation(
        _count(task.boxes, task.class_names, "bbox"),
        None if task.masks is None else _count(task.masks, task.class_names, "segm"),
    )


def _count(sides: Sides, names: list[str], kind: Kind) -> CocoNumbers:
    truth = sides.truth
    precision, recall = precision_and_recall(truth, sides.found, len(names), kind)
    num_boxes = np.bincount(truth.classes[~truth.is_crowd], minlength=len(names)).tolist()
    return _summarize(precision, recall, names, num_boxes)


def _summarize(precision: Precision, recall: Recall, names: list[str], num_boxes: list[int]) -> CocoNumbers:
    """Areas are all, small, medium, large; IoU 0.50 and 0.75 are the thresholds 0 and 5."""
    reached = recall[..., -1]  # up to 100 detections an image
    numbers = {"AP": precision[..., 0], "AP50": precision[0, :, 0], "AP75": precision[5, :, 0]}
    numbers |= {f"AP{size}": precision[..., area] for area, size in enumerate("sml", start=1)}
    numbers |= {f"AR{most}": recall[..., 0, index] for index, most in enumerate(MAX_DETECTIONS)}
    numbers |= {f"AR{size}": reached[..., area] for area, size in enumerate("sml", start=1)}
    columns = (precision[..., 0].mean(axis=0), numbers["AP50"], numbers["AP75"], reached[..., 0].mean(axis=0))
    rows = zip(names, *(column.round(_DIGITS).tolist() for column in columns), num_boxes, strict=True)
    per_class = {name: ClassNumbers(*of_class) for name, *of_class in rows}
    return CocoNumbers(**{key: _mean(values) for key, values in numbers.items()}, per_class=per_class)


def _mean(values: Float[np.ndarray, "..."]) -> float:
    """The mean of the values that are not -1; -1 if there is none."""
    existing = values[values > -1]
    return round(float(existing.mean()), _DIGITS) if existing.size else -1.0
