"""Ground truth and detections as they come (COCO's JSON) checked and put into columns of numbers.

Ids of any type become 0, 1, 2, ... in ascending order: equal scores are ranked in the order of the images.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from megdet.errors import InputError
from megdet.evaluation.matching import DetectionColumns, TruthColumns

_Records = list[dict[str, Any]]
_Numbers = dict[int | str, int]


@dataclass(frozen=True)
class Numbering:
    """The numbers of image and category ids, and the file or words that say where they come from."""

    images: _Numbers
    classes: _Numbers
    place: str


def read_truth(ground_truth: object, place: str) -> tuple[list[str], Numbering, TruthColumns]:
    """The names of the classes, the numbers of all ids, and the boxes of the COCO instances format.

    Raises InputError, with the place, for what cannot be evaluated.
    """
    if not isinstance(ground_truth, dict):
        raise InputError(f"{place} is not in the COCO instances format: it has to be an object with 'images'")
    images = _records(ground_truth.get("images"), "images", place)
    categories = _records(ground_truth.get("categories"), "categories", place)
    annotations = _records(ground_truth.get("annotations", []), "annotations", place)
    numbering = Numbering(_number(images, "image", place), _number(categories, "category", place), place)
    where = f"{place}, annotation"
    boxes = _boxes(annotations, where)
    columns = TruthColumns(
        boxes=boxes,
        images=_lookup(annotations, "image_id", numbering.images, where, "images"),
        classes=_lookup(annotations, "category_id", numbering.classes, where, "categories"),
        areas=_areas(annotations, boxes, where),
        is_crowd=np.array([_is_crowd(annotation, index, where) for index, annotation in enumerate(annotations)], bool),
    )
    return _names(categories, numbering.classes), numbering, columns


def read_detections(detections: object, place: str, numbering: Numbering) -> DetectionColumns:
    """The detections of the COCO result format. Raises InputError, with the place, for what cannot be evaluated."""
    found = _records(detections, "detections", place)
    where = f"{place}, detection"
    return DetectionColumns(
        boxes=_boxes(found, where),
        images=_lookup(found, "image_id", numbering.images, where, f"images of {numbering.place}"),
        classes=_lookup(found, "category_id", numbering.classes, where, f"categories of {numbering.place}"),
        scores=_finite([record.get("score") for record in found], where, "score"),
    )


def _records(value: object, name: str, place: str) -> _Records:
    if not isinstance(value, list):
        raise InputError(f"{place}: a list of {name} is expected, not {type(value).__name__}; is it the right file?")
    for index, record in enumerate(value):
        if not isinstance(record, dict):
            raise InputError(f"{place}: number {index} of the {name} is {record!r:.60}, an object is expected")
    return value


def _number(records: _Records, kind: str, place: str) -> _Numbers:
    """Ids -> 0, 1, ... in ascending order: numbers, then strings."""
    numbers: _Numbers = {}
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
    return {identity: number for number, identity in enumerate(ordered)}


def _lookup(records: _Records, key: str, numbers: _Numbers, where: str, among: str) -> Int64[np.ndarray, " rows"]:
    try:
        return np.array([numbers[record[key]] for record in records], np.int64)
    except (KeyError, TypeError):
        index, value = next((i, r.get(key)) for i, r in enumerate(records) if not _is_known(r.get(key), numbers))
        mend = f"give it an id from the {among}"
        other = str(value) if isinstance(value, int) else int(str(value)) if str(value).isdecimal() else None
        if other in numbers:
            mend = f"there is {other!r}: write the ids of both the same way, as numbers or as strings"
        raise InputError(f"{where} {index}: {key} {value!r:.60} is unknown; {mend}") from None


def _is_known(value: object, numbers: _Numbers) -> bool:
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


def _areas(annotations: _Records, boxes: Float[np.ndarray, "boxes 4"], where: str) -> Float[np.ndarray, " boxes"]:
    from_boxes = (boxes[:, 2] * boxes[:, 3]).tolist()
    given = [annotation.get("area") for annotation in annotations]
    return _finite(
        [computed if area is None else area for area, computed in zip(given, from_boxes, strict=True)], where, "area"
    )


def _finite(values: list[Any], where: str, name: str) -> Float[np.ndarray, " rows"]:
    for index, value in enumerate(values):
        if not _is_finite(value):
            raise InputError(f"{where} {index}: {name} {value!r:.60} is not a finite number; mend or remove the entry")
    return np.array(values, np.float64)


def _is_crowd(annotation: dict[str, Any], index: int, where: str) -> bool:
    value = annotation.get("iscrowd")
    if value not in (None, 0, 1):
        raise InputError(f"{where} {index}: iscrowd {value!r:.60} is neither 0 nor 1; mend it")
    return bool(value)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _names(categories: _Records, numbers: _Numbers) -> list[str]:
    """The names in the order of the categories' numbers; equal names get their id, so that none is lost."""
    ordered = sorted(categories, key=lambda category: numbers[category["id"]])
    names = [str(category.get("name", category["id"])) for category in ordered]
    twice = {name for name in names if names.count(name) > 1}
    return [f"{name} (id {c['id']})" if name in twice else name for name, c in zip(names, ordered, strict=True)]
