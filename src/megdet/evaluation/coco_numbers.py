"""The COCO numbers of boxes: twelve for the data set and some for every class.

The counting is faster-coco-eval's, in C++; it gives pycocotools' numbers. Here the data set and the detections are
checked, numbered the way it likes (ids of any type become 1, 2, 3, ... in their order) and handed over in memory. It is
quiet, and the caller's dicts stay as they are.

Differs from pycocotools where that goes wrong: string ids work, an annotation with id 0 counts like any other, `area`
and `iscrowd` may be missing (width x height, and 0), no detections at all give 0, and what cannot be evaluated (an
unknown image, a score that is not finite) is refused with its place instead of a wrong number or an assertion.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from jaxtyping import Float
from rich.table import Table
from rich.text import Text

from megdet.errors import InputError
from megdet.files import read_json

_Precision = Float[np.ndarray, "ious recalls classes areas max_detections"]
_Recall = Float[np.ndarray, "ious classes areas max_detections"]
_Records = list[dict[str, Any]]
_MAX_DETECTIONS = [1, 10, 100]


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
    an image (its mmAR). s, m and l are objects of an area below 32^2, up to 96^2 and above. A number about objects that
    the ground truth has none of is -1, as with pycocotools.
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
    def from_dict(cls, values: dict[str, Any]) -> "CocoNumbers":
        """The inverse of `as_dict`."""
        per_class = {name: ClassNumbers(**own) for name, own in values["per_class"].items()}
        return cls(**{**values, "per_class": per_class})


def evaluate_files(ground_truth: Path, detections: Path) -> CocoNumbers:
    """The numbers of a COCO result file against a COCO instances file.

    Raises:
        InputError: a file is missing, corrupt, or not of its format.
    """
    return _evaluate(read_json(ground_truth), read_json(detections), str(ground_truth), str(detections))


def evaluate_detections(ground_truth: Path | dict[str, Any], detections: _Records) -> CocoNumbers:
    """The numbers of detections against ground truth in the COCO instances format.

    Args:
        ground_truth: a file or its content: `images`, `categories`, `annotations`; boxes are x, y, width, height in
            pixels.
        detections: {image_id, category_id, bbox, score} each, with the ids of the ground truth; ties of the score go to
            the earlier one.

    Raises:
        InputError: the file is missing or corrupt; an id is unknown or occurs twice; a box or score is not finite.
    """
    if isinstance(ground_truth, Path):
        return _evaluate(read_json(ground_truth), detections, str(ground_truth), "the detections")
    return _evaluate(ground_truth, detections, "the ground truth", "the detections")


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
    """The classes' numbers in percent, in the order of their category ids; a dash for a class without boxes."""
    table = Table(title="Classes (percent)", title_justify="left")
    table.add_column("class")
    for heading in ("boxes", "mmAP", "mmAR", "AP50", "AP75"):
        table.add_column(heading, justify="right")
    for name, of_class in numbers.per_class.items():
        shown = [_percent(value) for value in (of_class.AP, of_class.AR100, of_class.AP50, of_class.AP75)]
        # Text, because rich reads [brackets] in a string as markup; and a terminal cannot show a lone surrogate
        printable = Text(name.encode("utf-8", errors="replace").decode())
        table.add_row(printable, str(of_class.num_boxes), *shown)
    return table


def _evaluate(ground_truth: object, detections: object, truth_place: str, detections_place: str) -> CocoNumbers:
    if not isinstance(ground_truth, dict):
        raise InputError(f"{truth_place} is not in the COCO instances format: it has to be an object with 'images'")
    images = _records(ground_truth.get("images"), "images", truth_place)
    categories = _records(ground_truth.get("categories"), "categories", truth_place)
    annotations = _records(ground_truth.get("annotations", []), "annotations", truth_place)
    found = _records(detections, "detections", detections_place)

    image_numbers = _numbering(images, "image", truth_place)
    category_numbers = _numbering(categories, "category", truth_place)
    where = f"{truth_place}, annotation"
    boxes = _boxes(annotations, where)
    image_of = _lookup(annotations, "image_id", image_numbers, where, "images")
    category_of = _lookup(annotations, "category_id", category_numbers, where, "categories")
    areas = _areas(annotations, boxes, where)
    is_crowd = [_is_crowd(annotation, index, where) for index, annotation in enumerate(annotations)]
    truth = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
        for i, (image, category, box, area, crowd) in enumerate(
            zip(image_of, category_of, boxes.tolist(), areas, is_crowd, strict=True), start=1
        )
    ]

    where = f"{detections_place}, detection"
    boxes = _boxes(found, where)
    image_of = _lookup(found, "image_id", image_numbers, where, f"images of {truth_place}")
    category_of = _lookup(found, "category_id", category_numbers, where, f"categories of {truth_place}")
    scores = _finite([record.get("score") for record in found], where, "score")
    results = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "score": score}
        for i, (image, category, box, score) in enumerate(
            zip(image_of, category_of, boxes.tolist(), scores, strict=True), start=1
        )
    ]

    precision, recall = _count(len(image_numbers), len(category_numbers), truth, results)
    names = _names(categories, category_numbers)
    num_boxes = [0] * (len(names) + 1)
    for category, crowd in zip((record["category_id"] for record in truth), is_crowd, strict=True):
        num_boxes[category] += not crowd
    return _summarize(precision, recall, names, num_boxes[1:])


def _count(num_images: int, num_categories: int, truth: _Records, results: _Records) -> tuple[_Precision, _Recall]:
    """Precision at 101 recalls, and recall, with -1 where a class has no object of the area."""
    images = [{"id": number} for number in range(1, num_images + 1)]
    categories = [{"id": number} for number in range(1, num_categories + 1)]
    truth_api = COCO({"images": images, "categories": categories, "annotations": truth})
    results_api = COCO({"images": images, "categories": categories, "annotations": results})
    evaluation = COCOeval_faster(truth_api, results_api, "bbox", print_function=lambda *_: None)
    evaluation.params.maxDets = _MAX_DETECTIONS
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _summarize(precision: _Precision, recall: _Recall, names: list[str], num_boxes: list[int]) -> CocoNumbers:
    """Areas are all, small, medium, large; IoU 0.50 and 0.75 are the thresholds 0 and 5."""
    at_recalls, reached = precision[..., -1], recall[..., -1]  # up to 100 detections an image
    numbers = {"AP": at_recalls[..., 0], "AP50": at_recalls[0, ..., 0], "AP75": at_recalls[5, ..., 0]}
    numbers |= {f"AP{size}": at_recalls[..., area] for area, size in enumerate("sml", start=1)}
    numbers |= {f"AR{most}": recall[..., 0, index] for index, most in enumerate(_MAX_DETECTIONS)}
    numbers |= {f"AR{size}": reached[..., area] for area, size in enumerate("sml", start=1)}
    per_class = {
        name: ClassNumbers(
            AP=_mean(at_recalls[:, :, index, 0]),
            AP50=_mean(at_recalls[0, :, index, 0]),
            AP75=_mean(at_recalls[5, :, index, 0]),
            AR100=_mean(reached[:, index, 0]),
            num_boxes=num_boxes[index],
        )
        for index, name in enumerate(names)
    }
    return CocoNumbers(**{key: _mean(values) for key, values in numbers.items()}, per_class=per_class)


def _mean(values: Float[np.ndarray, "..."]) -> float:
    """The mean of what exists, -1 where nothing does."""
    existing = values[values > -1]
    return float(existing.mean()) if existing.size else -1.0


def _records(value: object, name: str, place: str) -> _Records:
    if not isinstance(value, list):
        raise InputError(f"{place}: a list of {name} is expected, not {type(value).__name__}; is it the right file?")
    for index, record in enumerate(value):
        if not isinstance(record, dict):
            raise InputError(f"{place}: number {index} of the {name} is {record!r:.60}, an object is expected")
    return value


def _numbering(records: _Records, kind: str, place: str) -> dict[int | str, int]:
    """Ids -> 1, 2, ... in ascending order (numbers, then strings): equal scores are ranked in the order of images."""
    numbers: dict[int | str, int] = {}
    for index, record in enumerate(records):
        identity = record.get("id")
        if isinstance(identity, bool) or not isinstance(identity, int | str):
            raise InputError(f"{place}: {kind} number {index} has the id {identity!r}; give it a number or a string")
        if identity in numbers:
            raise InputError(f"{place}: the {kind} id {identity!r} occurs twice; every {kind} needs its own")
        numbers[identity] = 0
    if not numbers:
        raise InputError(f"{place}: there is no {kind}, so there is nothing to evaluate; is it the right file?")
    ordered = sorted(numbers, key=lambda identity: (isinstance(identity, str), identity))
    return {identity: number for number, identity in enumerate(ordered, start=1)}


def _lookup(records: _Records, key: str, numbers: dict[int | str, int], where: str, among: str) -> list[int]:
    try:
        return [numbers[record[key]] for record in records]
    except (KeyError, TypeError):
        index, value = next((i, r.get(key)) for i, r in enumerate(records) if not _is_known(r.get(key), numbers))
        mend = f"give it an id from the {among}"
        other = str(value) if isinstance(value, int) else int(str(value)) if str(value).isdecimal() else None
        if other in numbers:
            mend = f"there is {other!r}: write the ids of both the same way, as numbers or as strings"
        raise InputError(f"{where} {index}: {key} {value!r:.60} is unknown; {mend}") from None


def _is_known(value: object, numbers: dict[int | str, int]) -> bool:
    return isinstance(value, int | str | float | np.integer) and value in numbers


def _boxes(records: _Records, where: str) -> Float[np.ndarray, "boxes 4"]:
    try:
        boxes = np.array([record["bbox"] for record in records], dtype=np.float64).reshape(len(records), 4)
    except (KeyError, TypeError, ValueError, OverflowError):
        boxes = None
    if boxes is None or not np.isfinite(boxes).all():
        index, box = next((i, r.get("bbox")) for i, r in enumerate(records) if not _is_box(r.get("bbox")))
        raise InputError(f"{where} {index}: bbox {box!r:.80} is not x, y, width, height as finite numbers; mend it")
    return boxes


def _is_box(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 4 and all(_is_finite(number) for number in value)


def _areas(annotations: _Records, boxes: Float[np.ndarray, "boxes 4"], where: str) -> list[float]:
    from_boxes = (boxes[:, 2] * boxes[:, 3]).tolist()
    given = [annotation.get("area") for annotation in annotations]
    return _finite(
        [computed if area is None else area for area, computed in zip(given, from_boxes, strict=True)], where, "area"
    )


def _finite(values: list[Any], where: str, name: str) -> list[float]:
    for index, value in enumerate(values):
        if not _is_finite(value):
            raise InputError(f"{where} {index}: {name} {value!r:.60} is not a finite number; mend or remove the entry")
    return [float(value) for value in values]


def _is_crowd(annotation: dict[str, Any], index: int, where: str) -> int:
    value = annotation.get("iscrowd")
    if value not in (None, 0, 1):
        raise InputError(f"{where} {index}: iscrowd {value!r:.60} is neither 0 nor 1; mend it")
    return int(bool(value))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _names(categories: _Records, numbers: dict[int | str, int]) -> list[str]:
    """The names in the order of the categories' numbers; equal names get their id, so that none is lost."""
    ordered = sorted(categories, key=lambda category: numbers[category["id"]])
    names = [str(category.get("name", category["id"])) for category in ordered]
    twice = {name for name in names if names.count(name) > 1}
    return [f"{name} (id {c['id']})" if name in twice else name for name, c in zip(names, ordered, strict=True)]


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"
