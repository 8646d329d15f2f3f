"""The images and classes in a COCO file without annotations, such as those of the COCO server's test sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megdet.data.annotations import AnnotationTable
from megdet.data.coco import CocoDataset, name_fault, size_fault
from megdet.data.coco_rows import Number
from megdet.data.far.folder import ImageFolder
from megdet.data.headers import read_stamped_headers
from megdet.data.image import Header, pixels_fault
from megdet.errors import InputError, shown
from megdet.files import read_json
from megdet.recipe import Data


class _Image(msgspec.Struct):
    id: int | str
    file_name: str | None = None
    width: Number | None = None
    height: Number | None = None


class _Category(msgspec.Struct):
    id: int | str
    name: str | None = None


class _Content(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: msgspec.Raw = msgspec.Raw(b"")


@dataclass(frozen=True)
class ImageInfo:
    """The images and classes of a file, by their ids."""

    file: Path
    file_names: dict[int | str, str | None]
    sizes: dict[int | str, tuple[float, float] | None]
    """height and width in pixels, None if not in the file"""
    classes: dict[int | str, str]
    """names, in the order of the ids"""
    has_annotations: bool


def read_image_info(file: Path) -> ImageInfo:
    """Read the file. Raises InputError if it cannot be read, an id occurs twice, or it has no image or class."""
    content = read_json(file, _Content)
    for kind, rows in (("image", content.images), ("category", content.categories)):
        ids = [row.id for row in rows]
        if not ids:
            raise InputError(f"{file}: there is no {kind} in it; is it the right file?")
        if len({*ids}) < len(ids):
            twice = next(own for place, own in enumerate(ids) if own in ids[:place])
            raise InputError(f"{file}: the {kind} id {shown(twice)} occurs twice; every {kind} needs its own")
    ordered = sorted(content.categories, key=lambda row: (isinstance(row.id, str), row.id))
    return ImageInfo(
        file,
        {row.id: row.file_name for row in content.images},
        {
            row.id: None if row.height is None or row.width is None else (row.height, row.width)
            for row in content.images
        },
        {row.id: str(row.id) if row.name is None else row.name for row in ordered},
        bool(bytes(content.annotations)),
    )


def images_to_detect(info: ImageInfo, folder: ImageFolder, data: Data) -> CocoDataset:
    """A data set of images without annotations; `folder` has the files, `data` the limits of a recipe.

    Raises InputError for an image without a name, or whose file is missing, broken, too large or of another size.
    """
    names: list[str] = []
    for image_id, name in info.file_names.items():
        if not name:
            raise InputError(f"{info.file}, image {shown(image_id)}: the image has no 'file_name'")
        if fault := name_fault(name, folder, allow_outside=data.allow_outside_files):
            raise InputError(f"{info.file}, image {shown(image_id)}: {fault}")
        names.append(name)
    headers, stamps = read_stamped_headers(info.file, folder, names)
    for image_id, row in zip(info.file_names, headers.tolist(), strict=True):
        header = Header(row[0], row[1], bool(row[2]))
        declared = info.sizes[image_id] or (float("nan"), float("nan"))
        fault = size_fault(declared, header)
        if header.height * header.width > data.max_pixels:
            fault = pixels_fault(header.height, header.width, data.max_pixels)
        if fault:
            raise InputError(f"{info.file}, image {shown(image_id)}: {fault}")
    category_ids: Any = tuple(info.classes)
    return CocoDataset(
        annotations_file=info.file,
        image_folder=folder,
        class_names=tuple(info.classes.values()),
        category_ids=category_ids,
        image_ids=tuple(info.file_names),
        file_names=tuple(names),
        sizes=headers[:, :2],
        annotations=AnnotationTable(
            np.zeros(len(names), np.int64),
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.int64),
            np.zeros(0, np.bool_),
            np.zeros(0, np.float32),
            np.zeros(0, np.int64),
        ),
        stamps=None if isinstance(folder, Path) else stamps,
    )
