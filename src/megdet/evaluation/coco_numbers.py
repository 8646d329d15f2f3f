"""The COCO numbers of boxes: twelve for the data set and some for every class.

The data set and the detections are checked and put into columns (`columns`), and counted with pycocotools' rules
(`matching`): its numbers, many times as fast. It is quiet, and the caller's dicts stay as they are.

Differs from pycocotools where that goes wrong: string ids work, an annotation with id 0 counts like any other, `area`
and `iscrowd` may be missing (width x height, and 0), no detections at all give 0, and what cannot be evaluated (an
unknown image, a score that is not finite) is refused with its place instead of a wrong number or an assertion.
"""

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table
from rich.text import Text

from megdet.errors import printable
from megdet.evaluation.columns import Detection, Truth, detection_columns, truth_columns
from megdet.evaluation.matching import MAX_DETECTIONS, Precision, Recall, precision_and_recall
from megdet.files import read_json, typed

_MOST_SHOWN, _SHOWN = 100, 20  # classes in a table: all up to the first, else so many of the first and of the worst


@dataclass(frozen=True)
class ClassNumbers:
    """The numbers of one class, each in 0..1, or -1 where the class has no box in the ground truth.

    `num_boxes` counts its ground-truth boxes without crowds.
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


def evaluate_files(ground_truth: Path, detections: Path) -> CocoNumbers:
    """The numbers of a COCO result file against a COCO instances file.

    Raises:
        InputError: a file is missing, corrupt, or not of its format.
    """
    truth, found = read_json(ground_truth, Truth), read_json(detections, list[Detection])
    return _evaluate(truth, found, str(ground_truth), str(detections))


def evaluate_detections(ground_truth: Path | dict[str, Any], detections: list[dict[str, Any]]) -> CocoNumbers:
    """The numbers of detections against ground truth in the COCO instances format.

    Args:
        ground_truth: a file or its content: `images`, `categories`, `annotations`; boxes are x, y, width, height in
            pixels.
        detections: {image_id, category_id, bbox, score} each, with the ids of the ground truth; ties of the score go to
            the earlier one.

    Raises:
        InputError: the file is missing or corrupt; an id is unknown or occurs twice; a box or score is not finite, or a
            box has a negative size.
    """
    place = str(ground_truth) if isinstance(ground_truth, Path) else "the ground truth"
    truth = read_json(ground_truth, Truth) if isinstance(ground_truth, Path) else typed(ground_truth, Truth, place)
    return _evaluate(truth, typed(detections, list[Detection], "the detections"), place, "the detections")


def numbers_table(numbers: CocoNumbers) -> Table:
    """The twelve numbers in percent, mmAP and mmAR first; a dash where there is no such object."""
    meaning = {
        "AP": ("mmAP", "IoU 0.50:0.95"),
        "AR100": ("mmAR", "IoU 0.50:0.95, 100 detections an image"),
        "AP50": ("AP50", "IoU 0.50"),
        "AP75": ("AP75", "IoU 0.75"),
        "APs": ("APs", "objects below 32 x 32 pixels"),
        "APm": ("APm", "objects from 32 x 32 to 96 x 96 pixels"),
        "APl": ("APl", "objects above 96 x 96 pixels"),
        "AR1": ("AR1", "1 detection an image"),
        "AR10": ("AR10", "10 detections an image"),
        "ARs": ("ARs", "objects below 32 x 32 pixels"),
        "ARm": ("ARm", "objects from 32 x 32 to 96 x 96 pixels"),
        "ARl": ("ARl", "objects above 96 x 96 pixels"),
    }
    table = Table(title="COCO numbers, boxes (percent)", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("of", style="dim")
    for key, (name, of) in meaning.items():
        table.add_row(name, _percent(getattr(numbers, key)), of, style="bold" if name.startswith("mm") else None)
        if name == "mmAR":
            table.add_section()
    return table


def per_class_table(numbers: CocoNumbers) -> Table:
    """The classes' numbers in percent, in the order of their category ids; a dash for a class without boxes.

    Of many classes the table has the first twenty and, by their mmAP, the worst twenty that have boxes.
    """
    chosen = _shown_classes(numbers.per_class)
    title = "Classes (percent)"
    if len(chosen) < len(numbers.per_class):
        title = (
            f"The first {_SHOWN} of {len(numbers.per_class)} classes and the worst {_SHOWN} (percent), all in the JSON"
        )
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for heading in ("boxes", "mmAP", "mmAR", "AP50", "AP75"):
        table.add_column(heading, justify="right")
    for position, name in enumerate(chosen):
        of_class = numbers.per_class[name]
        shown = [_percent(value) for value in (of_class.AP, of_class.AR100, of_class.AP50, of_class.AP75)]
        if position == _SHOWN and len(chosen) < len(numbers.per_class):
            table.add_section()
        # Text, because rich reads [brackets] in a string as markup
        table.add_row(Text(printable(name)), str(of_class.num_boxes), *shown)
    return table


def _shown_classes(per_class: dict[str, ClassNumbers]) -> list[str]:
    if len(per_class) <= _MOST_SHOWN:
        return list(per_class)
    worst = sorted((name for name in per_class if per_class[name].num_boxes), key=lambda name: per_class[name].AP)
    return [*itertools.islice(per_class, _SHOWN), *worst[:_SHOWN]]


def _evaluate(truth_rows: Truth, detections: list[Detection], truth_place: str, detections_place: str) -> CocoNumbers:
    names, numbering, truth = truth_columns(truth_rows, truth_place)
    found = detection_columns(detections, detections_place, numbering)
    precision, recall = precision_and_recall(truth, found, len(names))
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
    rows = zip(names, *(column.tolist() for column in columns), num_boxes, strict=True)
    per_class = {name: ClassNumbers(*of_class) for name, *of_class in rows}
    return CocoNumbers(**{key: _mean(values) for key, values in numbers.items()}, per_class=per_class)


def _mean(values: Float[np.ndarray, "..."]) -> float:
    """The mean of what exists, -1 where nothing does."""
    existing = values[values > -1]
    return float(existing.mean()) if existing.size else -1.0


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"
