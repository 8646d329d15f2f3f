"""Labelled images as most tools have them, and how they become COCO files."""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from megdet.data.formats.converted import Converted, annotation_row, is_coordinate, write_converted
from megdet.data.formats.image_files import ImageFiles, refuse_mixed_splits, refuse_odd_split, split_of
from megdet.data.image import image_size
from megdet.errors import InputError, shown


class LabelledObject(NamedTuple):
    """An object in an image, in pixels of the image as displayed."""

    name: str
    """of its class"""
    box: tuple[float, float, float, float]
    """x, y, width, height"""
    polygons: Sequence[Sequence[float]] = ()
    """x1, y1, x2, y2, ...; empty if it has a box only"""
    is_crowd: bool = False


@dataclass(frozen=True)
class LabelledImage:
    """An image and its objects."""

    path: Path
    objects: Sequence[LabelledObject]
    where: str
    """the file and place that it was read from, for messages"""
    split: str = ""
    """empty: the folder of the image tells"""
    size: tuple[int, int] | None = None
    """height and width in pixels, where the annotations tell them"""


def write_labelled(
    labelled: Sequence[LabelledImage], images: ImageFiles, out: Path, class_names: Sequence[str] | None = None
) -> list[Converted]:
    """Write `out/annotations/<split>.json` for each split.

    Category ids count from 1, in the order of `class_names` or of the sorted names of all splits; image ids count from
    1 in the order of the paths.

    Raises:
        InputError: an image is labelled twice, or has another size than the annotations say; a box is not finite; only
            some images are in the folder of a split, or the name of a split is no file name; a file cannot be written.
    """
    labelled = sorted(labelled, key=lambda own: own.path)
    for before, own in pairwise(labelled):
        if before.path == own.path:
            raise InputError(f"{own.where}: {own.path} is labelled in {before.where} too: keep one of them")
    names = class_names or sorted({own.name for image in labelled for own in image.objects})
    category_ids = {name: number for number, name in enumerate(names, start=1)}
    splits = [own.split or split_of(own.path, images.root) for own in labelled]
    for own, split in zip(labelled, splits, strict=True):
        refuse_odd_split(split, own.where)
        for one in own.objects:
            if not all(map(is_coordinate, (*one.box, *(value for polygon in one.polygons for value in polygon)))):
                raise InputError(
                    f"{own.where}: the box of an object ({shown(one.name)}) is not finite or far too large"
                )
    refuse_mixed_splits((own.path, split) for own, split in zip(labelled, splits, strict=True))
    sizes = [checked_size(own.path, own.size, own.where) for own in labelled]  # all, before a file is written
    members: dict[str, list[tuple[int, LabelledImage]]] = defaultdict(list)
    for number, (own, split) in enumerate(zip(labelled, splits, strict=True), start=1):
        members[split or "all"].append((number, own))
    written = []
    for split in sorted(members):
        folder = Path(os.path.commonpath([own.path.parent for _, own in members[split]]))
        rows, annotations = [], []
        for number, own in members[split]:
            height, width = sizes[number - 1]
            file_name = own.path.relative_to(folder).as_posix()
            rows.append({"id": number, "file_name": file_name, "width": width, "height": height})
            for one in own.objects:
                row = annotation_row(number, category_ids[one.name], *one.box)
                row["iscrowd"] = int(one.is_crowd)
                if one.polygons:
                    row["segmentation"] = [[round(value, 3) for value in polygon] for polygon in one.polygons]
                annotations.append(row)
        written.append(write_converted(out / "annotations" / f"{split}.json", folder, rows, annotations, names))
    return written


def box_around_ellipse(
    centre: tuple[float, float], radii: tuple[float, float], angle: float
) -> tuple[float, float, float, float]:
    """The box (x, y, width, height) around an ellipse that is turned about its centre, by an angle in radians."""
    (x, y), (rx, ry) = centre, radii
    w = math.hypot(rx * math.cos(angle), ry * math.sin(angle))
    h = math.hypot(rx * math.sin(angle), ry * math.cos(angle))
    return x - w, y - h, 2 * w, 2 * h


def box_around(polygons: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """x, y, width and height of the box around polygons."""
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def checked_size(path: Path, declared: tuple[int, int] | None, where: str) -> tuple[int, int]:
    """Height and width of an image in pixels as displayed.

    Raises InputError if it cannot be read, or if its annotations, read from `where`, declare another size.
    """
    found = image_size(path)
    if declared is not None and declared != found:
        raise InputError(
            f"{where}: it says {declared[1]} x {declared[0]} pixels, but {path} has {found[1]} x {found[0]}: "
            "label the image as it is, or resize it back"
        )
    return found
