"""LabelMe: one JSON file an image, with the corners of shapes."""

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

from megdet.data.formats.converted import Converted
from megdet.data.formats.image_files import ImageFiles, files_of
from megdet.data.formats.labelled import LabelledImage, LabelledObject, box_around, write_labelled
from megdet.errors import InputError, shown
from megdet.files import read_json


class _Shape(msgspec.Struct):
    label: str
    points: list[tuple[float, float]]
    shape_type: str = "polygon"
    group_id: int | str | None = None


class _File(msgspec.Struct):
    """The keys that are used; the picture inside (`imageData`) is not."""

    shapes: list[_Shape]
    imagePath: str  # noqa: N815 - the file's own name for it
    imageHeight: int | None = None  # noqa: N815 - likewise
    imageWidth: int | None = None  # noqa: N815 - likewise


def convert_labelme(source: Path, out: Path, images: Path | None = None) -> list[Converted]:
    """Write a COCO file for each split.

    Rectangles, circles and masks become boxes, polygons become boxes with a segmentation; shapes of one label and one
    `group_id` are one object.

    Args:
        source: a folder of JSON files, with subfolders, or one file.
        out: the folder to write to.
        images: the folder of the images; by default `source`.

    Raises:
        InputError: a file is malformed, a shape has no box (a point, a line), or an image is missing.
    """
    paths = files_of(source, ".json")
    files = ImageFiles(images or (source if source.is_dir() else source.parent))
    labelled = []
    for path in paths:
        content = read_json(path, _File)
        image = files.find(content.imagePath, str(path), path.parent)
        size = None
        if content.imageHeight and content.imageWidth:
            size = content.imageHeight, content.imageWidth
        labelled.append(LabelledImage(image, list(_objects(content.shapes, path)), str(path), size=size))
    return write_labelled(labelled, files, out)


def _objects(shapes: list[_Shape], path: Path) -> Iterator[LabelledObject]:
    groups: dict[tuple[str, object], list[tuple[list[float], bool]]] = {}
    for number, shape in enumerate(shapes, start=1):
        where = f"{path}: shape {number} ({shown(shape.label)})"
        if not shape.label.strip():
            raise InputError(f"{path}: shape {number} has no label")
        key = (shape.label, number if shape.group_id is None else f"group {shape.group_id}")
        groups.setdefault(key, []).append(_corners(shape, where))
    for (label, _), parts in groups.items():
        outlines = [outline for outline, _ in parts]
        has_masks = all(is_polygon for _, is_polygon in parts)
        yield LabelledObject(label, box_around(outlines), outlines if has_masks else ())


def _corners(shape: _Shape, where: str) -> tuple[list[float], bool]:
    """The corners of a shape, and whether they are its outline."""
    flat = [value for point in shape.points for value in point]
    if not all(math.isfinite(value) for value in flat):
        raise InputError(f"{where}: its points are not finite numbers")
    if shape.shape_type == "polygon" and len(shape.points) >= 3:
        return flat, True
    if shape.shape_type in ("rectangle", "mask") and len(shape.points) in (2, 4):
        return flat, False
    if shape.shape_type == "circle" and len(shape.points) == 2:
        (x, y), edge = shape.points
        radius = math.dist((x, y), edge)
        return [x - radius, y - radius, x + radius, y + radius], False
    raise InputError(
        f"{where}: a {shown(shape.shape_type)} of {len(shape.points)} point(s) has no box: draw a rectangle or a "
        "polygon instead, or delete it"
    )
