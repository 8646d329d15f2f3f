"""A COCO instances file as columns: decoded and checked once, then cached in the user's cache folder.

A cached file is used if the SHA-256 of the annotation file and `FORMAT` are the same.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from megdet.data import segmentations
from megdet.data.coco_rows import (
    MARK,
    CategoryRow,
    CocoRows,
    ImageRow,
    Length,
    Number,
    ObjectRow,
    area_fault,
    box_fault,
    content_of,
    crowd_fault,
    declared_size,
    decode,
    image_fault,
    is_id,
    refusal,
)
from megdet.data.columns import Columns, id_array, id_column, ids_of, text_column, text_of
from megdet.data.segmentations import Segmentations
from megdet.data.user_cache import cache_file, recall, remember
from megdet.errors import InputError, shown
from megdet.files import is_file

FORMAT = "1"
"""Version of the columns; raise it when their meaning changes."""

_Fail = Callable[..., InputError]


@dataclass(frozen=True)
class CocoColumns:
    """The content of a file whose rows are valid; its images were not looked at."""

    class_names: tuple[str, ...]
    """in the order of the category ids"""
    category_ids: tuple[int, ...]
    """ascending"""
    image_ids: list[int | str]
    file_names: list[str]
    declared_sizes: NDArray[np.float64]
    """(images, 2): height, width as in the file, NaN if missing"""
    image_index: NDArray[np.int64]
    """(objects,): index of the object's image; objects are in the order of the file"""
    labels: NDArray[np.int64]
    is_crowd: NDArray[np.bool_]
    boxes: NDArray[np.float64]
    """(objects, 4): x1, y1, x2, y2 in pixels, not clipped"""
    areas: NDArray[np.float64]
    """square pixels, NaN if the file has none"""
    annotation_ids: NDArray[Any]
    """int64, or objects if an id is a string or does not fit"""
    segmentations: Segmentations | None = None
    """of the same objects; None if they were not asked for"""


def load_columns(file: Path, *, with_masks: bool = False) -> CocoColumns:
    """The columns of a COCO instances file, from the cache if the file has the same bytes; segmentations if asked for.

    Raises:
        InputError: the file is missing or no COCO instances file, an id is duplicate or unknown, a box is not four
            finite numbers or has a negative size, a segmentation is invalid (`with_masks`).
    """
    found = _recalled(file, _digest(file), with_masks)
    if found is None:
        content = content_of(file)
        source = hashlib.sha256(content, usedforsecurity=False).hexdigest()
        found = parse(file, content)
        remember(cache_file("annotations", file), _packed(found), format=FORMAT, source=source)
        if with_masks:
            masks = segmentations.parse(file, content)
            remember(cache_file("masks", file), masks.packed(), format=segmentations.FORMAT, source=source)
            found = _recalled(file, source, with_masks) or replace(found, segmentations=masks)
    return found


def _recalled(file: Path, source: str, with_masks: bool) -> CocoColumns | None:
    """The cached columns of a file with this SHA-256; None if any part is not cached."""
    columns = recall(cache_file("annotations", file), format=FORMAT, source=source)
    if columns is None or not with_masks:
        return None if columns is None else _unpacked(columns)
    cache = cache_file("masks", file)
    masks = recall(cache, is_mapped=True, format=segmentations.FORMAT, source=source)
    return None if masks is None else replace(_unpacked(columns), segmentations=segmentations.unpacked(masks, cache))


def parse(file: Path, content: bytes) -> CocoColumns:
    """The columns of a file's bytes. Raises InputError for the first invalid row."""
    rows: _SoundRows | CocoRows | None
    try:
        rows = _DECODER.decode(content.removeprefix(MARK))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        rows = None
    if rows is None or not _fit_together(rows):
        rows = _checked(file, decode(file, content))
    images: Sequence[ImageRow] = rows.images
    objects: Sequence[ObjectRow] = rows.annotations
    categories: Sequence[CategoryRow] = sorted(rows.categories, key=lambda category: category.id)
    index_of = {image.id: index for index, image in enumerate(images)}
    label_of = {category.id: label for label, category in enumerate(categories)}
    boxes = np.array([row.bbox for row in objects], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return CocoColumns(
        class_names=tuple(category.name for category in categories),
        category_ids=tuple(label_of),
        image_ids=list(index_of),
        file_names=[image.file_name for image in images],
        declared_sizes=np.array([declared_size(image) for image in images], np.float64).reshape(-1, 2),
        image_index=np.array([index_of[row.image_id] for row in objects], np.int64),
        labels=np.array([label_of[row.category_id] for row in objects], np.int64),
        is_crowd=np.array([bool(row.iscrowd) for row in objects], np.bool_),
        boxes=boxes,
        areas=np.array([row.area for row in objects], np.float64),  # None becomes NaN
        annotation_ids=id_array([row.id for row in objects]),
    )


def _digest(file: Path) -> str:
    """The SHA-256 of a file, read in pieces. Raises InputError."""
    with suppress(OSError):
        if is_file(file):
            with file.open("rb") as opened:
                return hashlib.file_digest(opened, lambda: hashlib.sha256(usedforsecurity=False)).hexdigest()
    return hashlib.sha256(content_of(file), usedforsecurity=False).hexdigest()  # content_of says what is wrong


class _SoundImage(ImageRow, kw_only=True, gc=False):
    id: int | str
    file_name: Annotated[str, Meta(min_length=1)]
    width: Number | None = None
    height: Number | None = None


class _SoundObject(ObjectRow, kw_only=True, gc=False):
    id: int | str
    image_id: int | str
    category_id: int
    bbox: Annotated[list[Number], Meta(min_length=4, max_length=4)]
    area: Length | None = None
    iscrowd: Literal[0, 1] | None = None


class _SoundCategory(CategoryRow, kw_only=True, gc=False):
    id: int
    name: str


class _SoundRows(msgspec.Struct):
    """The rows of nearly every file: types are checked while decoding, in a third of the time of `_checked`."""

    images: list[_SoundImage]
    annotations: list[_SoundObject]
    categories: list[_SoundCategory]


_DECODER = msgspec.json.Decoder(_SoundRows)


def _fit_together(rows: _SoundRows) -> bool:
    image_ids, category_ids = {row.id for row in rows.images}, {row.id for row in rows.categories}
    return (
        len(image_ids) == len(rows.images)
        and 0 < len(category_ids) == len(rows.categories)
        and len({row.id for row in rows.annotations}) == len(rows.annotations)
        and image_ids >= {row.image_id for row in rows.annotations}
        and category_ids >= {row.category_id for row in rows.annotations}
        and all(row.bbox[2] >= 0 and row.bbox[3] >= 0 for row in rows.annotations)
    )


def _checked(file: Path, rows: object) -> CocoRows:
    """The rows, checked one by one. Raises InputError for the first invalid row."""
    fail = partial(refusal, file)
    if not isinstance(rows, CocoRows):
        raise fail(_structure_fault(rows))
    category_ids = _category_ids(rows.categories, fail)
    image_ids = _unique_ids(rows.images, "image", fail)
    for image in rows.images:
        if fault := image_fault(image):
            raise fail(fault, image.id)
    _unique_ids(rows.annotations, "annotation", fail)
    for row in rows.annotations:
        if fault := _object_fault(row, image_ids, category_ids):
            raise fail(fault, row.image_id, row.id)
    return rows


def _structure_fault(document: object) -> str:
    if not isinstance(document, dict):
        return "this is not a COCO instances file: the JSON is not an object"
    tables = ("categories", "images", "annotations")
    key = next(key for key in tables if not _is_table(document.get(key)))
    return f"this is not a COCO instances file: '{key}' is not a list of objects"


def _is_table(rows: object) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def _unique_ids(rows: Sequence[ImageRow | ObjectRow], word: str, fail: _Fail) -> set[int | str]:
    seen: set[int | str] = set()
    for row in rows:
        if not is_id(row.id):
            raise fail(f"an {word} has the id {shown(row.id)}, which is neither an integer nor a string")
        if row.id in seen:
            raise fail(f"two {word}s have the same id", **{f"{word}_id": row.id})
        seen.add(row.id)
    return seen


def _category_ids(categories: list[CategoryRow], fail: _Fail) -> set[int]:
    seen: set[int] = set()
    for category in categories:
        if type(category.id) is not int or not isinstance(category.name, str):
            what = {"id": category.id, "name": category.name}
            raise fail(f"category {shown(what)} needs an integer 'id' and a string 'name'")
        if category.id in seen:
            raise fail(f"two categories have the id {category.id}")
        seen.add(category.id)
    if not seen:
        raise fail("'categories' is empty, there is nothing to detect")
    return seen


def _object_fault(row: ObjectRow, image_ids: set[int | str], category_ids: set[int]) -> str:
    if not is_id(row.image_id) or row.image_id not in image_ids:
        return "the annotation's image_id is not among the images"
    if type(row.category_id) is not int or row.category_id not in category_ids:
        return f"category_id {shown(row.category_id)} is not among the categories"
    return crowd_fault(row.iscrowd) or area_fault(row.area) or box_fault(row.bbox)


def _packed(found: CocoColumns) -> Columns:
    return {
        "names": text_column([found.class_names, found.category_ids, found.image_ids, found.file_names]),
        "declared_sizes": found.declared_sizes,
        "image_index": found.image_index.astype(np.int32),
        "labels": found.labels.astype(np.int32),
        "is_crowd": found.is_crowd,
        "boxes": found.boxes,
        "areas": found.areas,
        "annotation_ids": id_column(found.annotation_ids),
    }


def _unpacked(columns: Columns) -> CocoColumns:
    class_names, category_ids, image_ids, file_names = text_of(columns["names"])
    return CocoColumns(
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        image_ids=image_ids,
        file_names=file_names,
        declared_sizes=columns["declared_sizes"],
        image_index=columns["image_index"].astype(np.int64),
        labels=columns["labels"].astype(np.int64),
        is_crowd=columns["is_crowd"],
        boxes=columns["boxes"],
        areas=columns["areas"],
        annotation_ids=ids_of(columns["annotation_ids"]),
    )
