"""The input of an evaluation: ground truth and detections, read, checked and in columns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megdet.data.result_rows import Detection, Id
from megdet.evaluation.columns import MaskedTruth, Truth, detection_columns, truth_columns
from megdet.evaluation.counting import DetectionColumns, TruthColumns
from megdet.evaluation.masks import with_masks
from megdet.files import read_json, typed


@dataclass(frozen=True)
class Sides:
    """Ground truth and detections in columns; images and classes are numbered alike."""

    truth: TruthColumns
    found: DetectionColumns


@dataclass(frozen=True)
class Task:
    """The ground truth and the detections of a data set."""

    class_names: list[str]
    """in the order of the categories' ids; equal names are followed by their id"""
    category_ids: list[Id]
    """in the order of `class_names`"""
    image_ids: list[Id]
    """in ascending order, numbers before strings: the index of an id is the image's number in the columns"""
    boxes: Sides
    masks: Sides | None = None
    """ground truth and detections with masks; None if there are no masks"""


def read_task(
    ground_truth: Path | dict[str, Any], detections: Path | list[dict[str, Any]], *, has_masks: bool = False
) -> Task:
    """Ground truth in the COCO instances format and detections in the COCO result format, as files or content.

    With `has_masks` masks are read even if there is no detection. Raises InputError, with the place, for invalid input
    (`coco_numbers.evaluate_detections` lists it).
    """
    if isinstance(detections, Path):
        rows, place = read_json(detections, list[Detection]), str(detections)
    else:
        rows, place = typed(detections, list[Detection], "the detections"), "the detections"
    has_masks = has_masks or any(row.segmentation is not None for row in rows)
    kind: type[Truth] = MaskedTruth if has_masks else Truth
    if isinstance(ground_truth, Path):
        truth_rows, truth_place = read_json(ground_truth, kind), str(ground_truth)
    else:
        truth_rows, truth_place = typed(ground_truth, kind, "the ground truth"), "the ground truth"
    names, numbering, truth = truth_columns(truth_rows, truth_place)
    found = detection_columns(rows, place, numbering)
    ids = list(numbering.classes), list(numbering.images)
    if not isinstance(truth_rows, MaskedTruth):
        return Task(names, *ids, Sides(truth, found))
    masked = with_masks(truth_rows, truth, rows, found, numbering, place)
    return Task(names, *ids, Sides(truth, masked.found_boxes), Sides(masked.truth, masked.found))
