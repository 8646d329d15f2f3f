"""COCO instances files: what a detector is trained and scored on.

`load_coco` refuses what cannot be meant (`megdet data check` lists all of it); it repairs two things that the original
COCO files need: boxes are clipped to the image, and boxes without area are dropped and counted.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from megdet.data.annotations import AnnotationTable
from megdet.data.headers import read_headers
from megdet.data.image import Header
from megdet.errors import InputError
from megdet.files import read_json, replace_file

EDGE_TOLERANCE = 1.0
"""pixels: boxes of labelling tools end up to one pixel outside their image"""

_Fail = Callable[..., InputError]


@dataclass(frozen=True)
class CocoDataset:
    """The images of one COCO instances file, in its order."""

    annotations_file: Path
    image_folder: Path
    class_names: tuple[str, ...]
    """in the order of the category ids"""
    category_ids: tuple[int, ...]
    """ascending, with whatever gaps the file has"""
    image_ids: tuple[int | str, ...]
    file_names: tuple[str, ...]
    """relative to `image_folder`"""
    sizes: NDArray[np.int64]
    """(images, 2): height, width in pixels as displayed (EXIF applied), from the files' headers"""
    annotations: AnnotationTable
    """one an image"""
    num_dropped: int = 0
    """boxes left out because they have no area inside their image"""

    def __len__(self) -> int:
        return len(self.image_ids)

    def image_path(self, index: int) -> Path:
        """The file of the image at a position of this data set."""
        return self.image_folder / self.file_names[index]


def load_coco(annotations_file: Path, image_folder: Path, *, keep_empty: bool) -> CocoDataset:
    """Read a COCO instances file and the sizes of its images.

    Images without a box that can be a target (none at all, crowds only, none with area) are left out unless
    `keep_empty`. Image sizes are cached in the user's cache folder.

    Raises:
        InputError: a file or a key is missing, an id is duplicate or unknown, a box is not four finite numbers or has a
            negative size, an image has another size than the file says, or no image is left.
    """
    document = read_json(annotations_file)
    fail = partial(_refusal, annotations_file)
    categories = _table(document, "categories", fail)
    images = _table(document, "images", fail)
    objects = _table(document, "annotations", fail)

    label_of = _labels(categories, fail)
    index_of = {image_id: index for index, image_id in enumerate(_unique_ids(images, "image", fail))}
    file_names = [_file_name(image, fail) for image in images]
    annotation_ids = _unique_ids(objects, "annotation", fail)
    columns = _columns(objects, index_of, label_of, fail)

    is_needed = np.ones(len(images), bool)
    if not keep_empty:
        width_height = columns.boxes[:, 2:] - columns.boxes[:, :2]
        is_target = ~columns.is_crowd & (width_height > 0).all(axis=1)
        is_needed = np.bincount(columns.image_index[is_target], minlength=len(images)) > 0
    needed = np.flatnonzero(is_needed).tolist()
    headers = read_headers(annotations_file, image_folder, [file_names[index] for index in needed])
    sizes = np.full((len(images), 2), 1 << 20, np.int64)  # unread sizes cut nothing
    for index, header in zip(needed, headers, strict=True):
        sizes[index] = header[:2]
        own_boxes = columns.boxes[columns.image_index == index] if header[2] else columns.boxes[:0]
        _check_size(images[index], header, own_boxes, fail)

    boxes = _clipped(columns, sizes)
    has_area = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    has_target = np.bincount(columns.image_index[has_area & ~columns.is_crowd], minlength=len(images)) > 0
    kept = [index for index in needed if keep_empty or has_target[index]]
    if not kept:
        raise InputError(f"{annotations_file}: no image {'' if keep_empty else 'with a box '}is in this file")
    by_category = sorted(label_of.items(), key=lambda item: item[1])
    names = {category["id"]: category["name"] for category in categories}
    return CocoDataset(
        annotations_file=annotations_file,
        image_folder=image_folder,
        class_names=tuple(names[category_id] for category_id, _ in by_category),
        category_ids=tuple(category_id for category_id, _ in by_category),
        image_ids=tuple(images[i]["id"] for i in kept),
        file_names=tuple(file_names[i] for i in kept),
        sizes=sizes[kept],
        annotations=_deal_out(columns, boxes, annotation_ids, has_area, kept),
        num_dropped=int((~has_area).sum()),
    )


def write_coco(
    path: Path,
    *,
    images: Sequence[dict[str, Any]],
    annotations: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    info: dict[str, Any] | None = None,
) -> None:
    """Write a COCO instances file, complete or not at all, making its folder; the same input gives the same bytes.

    Raises:
        InputError: the file cannot be written.
    """
    document = {"info": info or {}, "images": images, "annotations": annotations, "categories": categories}
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def box_fault(bbox: object) -> str:
    """What is wrong with a `bbox` of a file, or nothing: it must be four finite numbers x, y, width, height."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return "bbox is not a list of four numbers x, y, width, height" if bbox is not None else "bbox is missing"
    if not all(is_number(value) for value in bbox):
        return f"bbox {bbox} has a value that is not a finite number"
    if bbox[2] < 0 or bbox[3] < 0:
        return f"bbox {bbox} has a negative width or height"
    return ""


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of a JSON file is a finite number (and no boolean)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def is_id(value: object) -> TypeGuard[int | str]:
    """Whether a value of a JSON file can name an image or an annotation."""
    return type(value) in (int, str)


@dataclass(frozen=True)
class _Columns:
    """All annotations of a file, one a row, in its order; boxes are not clipped yet."""

    image_index: NDArray[np.int64]
    labels: NDArray[np.int64]
    is_crowd: NDArray[np.bool_]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    """NaN where the file has none"""


def _refusal(file: Path, fault: str, image_id: object = None, annotation_id: object = None) -> InputError:
    where = f", image {image_id!r}" if image_id is not None else ""
    where += f", annotation {annotation_id!r}" if annotation_id is not None else ""
    return InputError(f"{file}{where}: {fault}; run `megdet data check` to see every problem of this file")


def _table(document: object, key: str, fail: _Fail) -> list[dict[str, Any]]:
    if not isinstance(document, dict):
        raise fail("this is not a COCO instances file: the JSON is not an object")
    rows = document.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise fail(f"this is not a COCO instances file: '{key}' is not a list of objects")
    return rows


def _unique_ids(rows: list[dict[str, Any]], word: str, fail: _Fail) -> list[int | str]:
    ids = [row.get("id") for row in rows]
    seen: set[object] = set()
    for value in ids:
        if not is_id(value):
            raise fail(f"an {word} has the id {value!r}, which is neither an integer nor a string")
        if value in seen:
            raise fail(f"two {word}s have the same id", **{f"{word}_id": value})
        seen.add(value)
    return ids  # type: ignore[return-value]  # just checked


def _labels(categories: list[dict[str, Any]], fail: _Fail) -> dict[int, int]:
    ids = [category.get("id") for category in categories]
    for category, value in zip(categories, ids, strict=True):
        if type(value) is not int or not isinstance(category.get("name"), str):
            raise fail(f"category {category} needs an integer 'id' and a string 'name'")
    if len(set(ids)) < len(ids):
        raise fail(f"two categories have the id {next(value for value in ids if ids.count(value) > 1)}")
    if not ids:
        raise fail("'categories' is empty, there is nothing to detect")
    return {value: label for label, value in enumerate(sorted(ids))}  # type: ignore[type-var, misc]  # just checked


def _file_name(image: dict[str, Any], fail: _Fail) -> str:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        raise fail("the image has no 'file_name'", image["id"])
    return name


def _columns(
    objects: list[dict[str, Any]], index_of: dict[int | str, int], label_of: dict[int, int], fail: _Fail
) -> _Columns:
    for row in objects:
        image_id, category_id, area = row.get("image_id"), row.get("category_id"), row.get("area")
        fault = box_fault(row.get("bbox"))
        if not is_id(image_id) or image_id not in index_of:
            fault = "the annotation's image_id is not among the images"
        elif type(category_id) is not int or category_id not in label_of:
            fault = f"category_id {category_id!r} is not among the categories"
        elif row.get("iscrowd") not in (None, 0, 1):
            fault = f"iscrowd is {row['iscrowd']!r}, not 0 or 1"
        elif area is not None and not (is_number(area) and area >= 0):
            fault = f"area is {area!r}, not a number of square pixels"
        if fault:
            raise fail(fault, image_id, row["id"])
    boxes = np.array([row["bbox"] for row in objects], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    areas = [row.get("area") for row in objects]
    return _Columns(
        image_index=np.array([index_of[row["image_id"]] for row in objects], np.int64),
        labels=np.array([label_of[row["category_id"]] for row in objects], np.int64),
        is_crowd=np.array([bool(row.get("iscrowd")) for row in objects], np.bool_),
        boxes=boxes,
        areas=np.array([math.nan if area is None else area for area in areas], np.float64),
    )


def size_fault(image: dict[str, Any], header: Header) -> str:
    """How the `width` and `height` of an image of the file contradict its header, or nothing.

    A file that gives the size before EXIF rotation is believed (its boxes may tell otherwise).
    """
    height, width = image.get("height", header.height), image.get("width", header.width)
    if (height, width) == (header.height, header.width) or (
        header.is_swapped and (width, height) == (header.height, header.width)
    ):
        return ""
    return f"the file is {header.width} x {header.height} pixels, the annotations say {width} x {height}"


def is_sized_before_exif(image: dict[str, Any], header: Header) -> bool:
    """Whether the file gives the size of an image before its EXIF rotation, so that its boxes may be turned too."""
    return header.is_swapped and image.get("width") == header.height != header.width


def _check_size(image: dict[str, Any], header: Header, own_boxes: NDArray[np.float64], fail: _Fail) -> None:
    fault = size_fault(image, header)
    if fault:
        raise fail(fault, image["id"])
    limits = np.array([header.width, header.height]) + EDGE_TOLERANCE
    if is_sized_before_exif(image, header) and np.any(own_boxes[:, 2:] > limits):
        raise fail("the boxes were drawn before the EXIF rotation of the image, turn them or the image", image["id"])


def _clipped(columns: _Columns, sizes: NDArray[np.int64]) -> NDArray[np.float32]:
    limits = np.tile(sizes[columns.image_index][:, ::-1], 2)
    return np.clip(columns.boxes, 0, limits).astype(np.float32)


def _deal_out(
    columns: _Columns,
    boxes: NDArray[np.float32],
    annotation_ids: list[int | str],
    is_used: NDArray[np.bool_],
    images: list[int],
) -> AnnotationTable:
    """The annotations in use of the given images, in the order of the images and, within one, of the file."""
    place = np.full(columns.image_index.max(initial=max(images)) + 1, -1)
    place[images] = np.arange(len(images))
    rows = np.flatnonzero(is_used & (place[columns.image_index] >= 0))
    rows = rows[np.argsort(place[columns.image_index[rows]], kind="stable")]
    areas = np.where(np.isnan(columns.areas), (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), columns.areas)
    return AnnotationTable(
        np.bincount(place[columns.image_index[rows]], minlength=len(images)),
        boxes[rows],
        columns.labels[rows],
        columns.is_crowd[rows],
        areas[rows].astype(np.float32),
        [annotation_ids[row] for row in rows.tolist()],
    )
