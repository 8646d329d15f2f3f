"""What every conversion ends with: a COCO file, and a link to the images, which are neither copied nor moved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from megdet.data.coco import write_coco
from megdet.data.image import IMAGE_SUFFIXES
from megdet.errors import InputError, shown
from megdet.files import read_text

_LARGEST_NUMBER = 1e30  # its square is finite


@dataclass(frozen=True)
class Converted:
    """One COCO file that was written, and what to use it with."""

    annotations_file: Path
    image_folder: Path
    """where the images lie, as before"""
    num_images: int
    num_boxes: int
    class_names: tuple[str, ...]


def link_images(converted: Converted, out: Path) -> Path:
    """Link the image folder into `out` beside the annotations, as `images` or `images_<split>`.

    Returns the link, or the folder itself if the file system allows no links. Raises InputError if another file has
    that name.
    """
    own = converted.annotations_file.stem
    target = converted.image_folder.resolve()
    for link in (out / "images", out / f"images_{own}"):
        if link.exists() and link.resolve() == target:
            return link
        if not link.exists() and not link.is_symlink():
            try:
                link.symlink_to(target, target_is_directory=True)
            except OSError:  # a file system without links: the folder itself serves as well
                return converted.image_folder
            return link
    raise InputError(f"{out / 'images'} exists and is not {target}: choose another OUT folder")


def number_of(text: str | None) -> float:
    """The number in a text; NaN if it is not a number or larger than any box."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if abs(value) <= _LARGEST_NUMBER else math.nan


def is_coordinate(value: object) -> TypeGuard[float]:
    """Whether a value is a number that may be a coordinate: finite, and its square too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1."""
    return [(number, line) for number, line in enumerate(read_text(path).splitlines(), start=1) if line.strip()]


def is_image(path: Path) -> bool:
    """Whether a path is a file with the ending of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def annotation_row(image_id: int, category_id: int, x: float, y: float, w: float, h: float) -> dict[str, Any]:
    """A row of a COCO file without its id; coordinates are rounded to a thousandth of a pixel."""
    box = [round(value, 3) for value in (x, y, w, h)]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "area": round(w * h, 3), "iscrowd": 0}


def write_converted(
    file: Path,
    image_folder: Path,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    class_names: Sequence[str],
) -> Converted:
    """Write a COCO file. Raises InputError for a file name that is not UTF-8, or if it cannot be written."""
    for image in images:
        if not _is_unicode(image["file_name"]):
            raise InputError(f"{image_folder}: the name of {shown(image['file_name'])} is not UTF-8; rename the file")
    numbered = [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)]
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names, start=1)]
    write_coco(file, images=images, annotations=numbered, categories=categories)
    return Converted(file, image_folder, len(images), len(numbered), tuple(class_names))


def _is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8; a byte of a file name that is not UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
