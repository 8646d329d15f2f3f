"""Ground truth and detections (COCO's JSON), checked and put into columns of numbers.

Ids of any type become 0, 1, 2, ... in ascending order: equal scores are ranked in the order of the images.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from jaxtyping import Int64

from megdet.data.coco_rows import Length, Number
from megdet.data.result_rows import Box, Detection, Id, Rle
from megdet.errors import InputError, shown
from megdet.evaluation.counting import DetectionColumns, TruthColumns


class Image(msgspec.Struct):
    """An image of the ground truth."""

    id: int | str


class SizedImage(Image):
    """An image of the ground truth with its size in pixels."""

    width: Number | None = None
    height: Number | None = None


class Category(msgspec.Struct):
    """A class of the ground truth."""

    id: int | str
    name: str | None = None


class Annotation(msgspec.Struct, gc=False):
    """A box of the ground truth: x, y, width, height in pixels; `area` in square pixels may be that of a mask."""

    image_id: Id
    category_id: Id
    bbox: Box
    area: Length | None = None
    iscrowd: Literal[0, 1] | bool | None = None


class MaskedAnnotation(Annotation, gc=False):
    """A box with its mask: run lengths, or polygons of x, y, x, y, ... in pixels."""

    segmentation: Rle | list[list[Number]] | None = None


class Truth(msgspec.Struct):
    """The keys of the COCO instances format that are read to evaluate boxes."""

    images: Sequence[Image]
    categories: Sequence[Category]
    annotations: Sequence[Annotation] = ()


class MaskedTruth(Truth):
    """The keys that are read to evaluate boxes and masks."""

    images: Sequence[SizedImage]
    annotations: Sequence[MaskedAnnotation] = ()


_Numbers = dict[Id, int]


@dataclass(frozen=True)
class Numbering:
    """The numbers of image and category ids, and their source (a file or words) for messages."""

    images: _Numbers
    classes: _Numbers
    place: str


def truth_columns(truth: Truth, place: str) -> tuple[list[str], Numbering, TruthColumns]:
    """The names of the classes, the numbers of all ids, and the boxes.

    Raises InputError, with the place, for an invalid row.
    """
    numbering = Numbering(_number(truth.images, "image", place), _number(truth.categories, "category", place), place)
    rows, where = truth.annotations, f"{place}: annotations"
    areas = [box.bbox[2] * box.bbox[3] if box.area is None else box.area for box in rows]
    columns = TruthColumns(
        boxes=np.array([box.bbox for box in rows], np.float64).reshape(-1, 4),
        images=_lookup([box.image_id for box in rows], "image_id", numbering.images, where, "images"),
        classes=_lookup([box.category_id for box in rows], "category_id", numbering.classes, where, "categories"),
        areas=np.array(areas, np.float64),
        is_crowd=np.array([bool(box.iscrowd) for box in rows], np.bool_),
    )
    return _names(truth.categories, numbering.classes), numbering, columns


def detection_columns(found: Sequence[Detection], place: str, numbering: Numbering) -> DetectionColumns:
    """The detections in columns. Raises InputError, with the place, for an id that the ground truth does not have."""
    where, images, classes = f"{place}: ", f"images of {numbering.place}", f"categories of {numbering.place}"
    bare = next((index for index, row in enumerate(found) if row.bbox is None and row.segmentation is None), None)
    if bare is not None:
        raise InputError(f"{where}[{bare}]: a detection needs a bbox, a segmentation or both")
    nowhere = (0.0, 0.0, 0.0, 0.0)  # until the box of its mask is known
    boxes = np.array([nowhere if row.bbox is None else row.bbox for row in found], np.float64).reshape(-1, 4)
    return DetectionColumns(
        boxes=boxes,
        images=_lookup([box.image_id for box in found], "image_id", numbering.images, where, images),
        classes=_lookup([box.category_id for box in found], "category_id", numbering.classes, where, classes),
        areas=boxes[:, 2] * boxes[:, 3],
        scores=np.array([box.score for box in found], np.float64),
    )


def _number(records: Sequence[Image | Category], kind: str, place: str) -> _Numbers:
    """Ids -> 0, 1, ... in ascending order: numbers, then strings."""
    counts = Counter(record.id for record in records)
    if not counts:
        raise InputError(f"{place}: there is no {kind}, so there is nothing to evaluate; is it the right file?")
    most, times = counts.most_common(1)[0]
    if times > 1:
        raise InputError(f"{place}: the {kind} id {shown(most)} occurs twice; every {kind} needs its own")
    ordered = sorted(counts, key=lambda identity: (isinstance(identity, str), identity))
    return {identity: number for number, identity in enumerate(ordered)}


def _lookup(ids: Sequence[Id], key: str, numbers: _Numbers, where: str, among: str) -> Int64[np.ndarray, " rows"]:
    found = [numbers.get(identity) for identity in ids]
    if None not in found:
        return np.array(found, np.int64)
    index = found.index(None)
    mend, value = f"give it an id from the {among}", ids[index]
    other = str(value) if not isinstance(value, str) else int(value) if value.isdecimal() and len(value) < 20 else None
    if other in numbers:
        mend = f"there is {other!r}: write the ids of both the same way, as numbers or as strings"
    raise InputError(f"{where}[{index}].{key}: {shown(value)} is unknown; {mend}")


def _names(categories: Sequence[Category], numbers: _Numbers) -> list[str]:
    """The names in the order of the categories' numbers; equal names get their id, so that none is lost."""
    ordered = sorted(categories, key=lambda category: numbers[category.id])
    names = [str(category.id) if category.name is None else category.name for category in ordered]
    counts = Counter(names)
    return [f"{name} (id {c.id})" if counts[name] > 1 else name for name, c in zip(names, ordered, strict=True)]
