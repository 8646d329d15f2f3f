"""Label Studio's exports `JSON` and `JSON-MIN`: one file with all tasks, in parts of an image."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from megdet.data.formats.converted import Converted, is_coordinate
from megdet.data.formats.image_files import ImageFiles, files_of
from megdet.data.formats.labelled import LabelledImage, LabelledObject, box_around, box_around_ellipse, write_labelled
from megdet.data.image import image_size
from megdet.errors import InputError, shown
from megdet.files import read_json

_UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-(.+)")
"""Label Studio puts eight digits before the name of an uploaded file."""
_WITHOUT_BOX = ("keypoint", "brush", "video", "vector", "bitmask")


class _Result(msgspec.Struct):
    type: str
    value: dict[str, Any] = {}
    """empty of a relation between two regions"""


class _Annotation(msgspec.Struct):
    result: list[_Result]
    was_cancelled: bool = False
    ground_truth: bool = False


class _Task(msgspec.Struct):
    data: dict[str, Any]
    annotations: list[_Annotation]


def convert_label_studio(source: Path, out: Path, images: Path | None = None) -> list[Converted]:
    """Write a COCO file for each split that the folders of the images name.

    Rectangles (the box around them, where they are rotated) and ellipses become boxes, polygons become boxes with a
    segmentation. Choices, ratings, texts and relations are no objects and are left out.

    Args:
        source: the JSON file, or a folder of them.
        out: the folder to write to.
        images: the folder of the images; by default that of the JSON files.

    Raises:
        InputError: a file is malformed, a task has annotations of several people, a region has no box (a point, a
            brush), or an image is missing.
    """
    paths = files_of(source, ".json")
    files = ImageFiles(images or (source if source.is_dir() else source.parent))
    labelled = []
    for path in paths:
        for number, task in enumerate(read_json(path, list[dict[str, Any]]), start=1):
            where = f"{path}: task {number}"
            address, regions = _min_task(task, where) if "annotations" not in task else _task(task, where)
            image = _image_of(address, files, where, path.parent)
            height, width = image_size(image)
            labelled.append(LabelledImage(image, [_object(own, width, height, where) for own in regions], where))
    if not labelled:
        raise InputError(f"{paths[0]}: no image in it, so there is nothing to convert")
    return write_labelled(labelled, files, out)


def _task(content: dict[str, Any], where: str) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """The address of a task's image, and its regions: kind and value."""
    try:
        task = msgspec.convert(content, _Task)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {error}; export it as JSON again") from None
    finished = [own for own in task.annotations if not own.was_cancelled]
    chosen = [own for own in finished if own.ground_truth] or finished
    if len(chosen) > 1:
        raise InputError(f"{where}: {len(chosen)} annotations: delete all but one, or mark one as ground truth")
    regions = [(own.type, own.value) for one in chosen for own in one.result]
    return _address(task.data, where), [own for own in regions if _is_region(own, where)]


def _min_task(content: dict[str, Any], where: str) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """The same of JSON-MIN, where a list of regions stands under the name of its control."""
    regions = []
    for value in content.values():
        for own in value if isinstance(value, list) else []:
            kinds = [key for key in own if key.endswith("labels")] if isinstance(own, dict) else []
            regions += [(kind, own) for kind in kinds]
    return _address(content, where), [own for own in regions if _is_region(own, where)]


def _address(data: dict[str, Any], where: str) -> str:
    texts = [(key, value) for key, value in data.items() if isinstance(value, str)]
    found = [value for key, value in texts if key in ("image", "img", "image_url", "photo", "picture")]
    found = found or [
        value for _, value in texts if re.search(r"\.(jpe?g|png|bmp|webp|tiff?|gif|p[pg]m)$", value, re.I)
    ]
    if len(found) != 1:
        raise InputError(f"{where}: {'no' if not found else 'more than one'} image in it: its key should be `image`")
    return found[0]


def _image_of(address: str, files: ImageFiles, where: str, beside: Path) -> Path:
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise InputError(f"{where}: {shown(address)} is no address: {error}") from None
    named = parse_qs(parts.query)["d"][0] if "d" in parse_qs(parts.query) else unquote(parts.path)
    try:
        return files.find(named, where, beside)
    except InputError:
        prefixed = _UPLOAD_PREFIX.fullmatch(named.rsplit("/", 1)[-1])
        if prefixed is None:
            raise
    return files.find(prefixed[1], where, beside)


def _is_region(region: tuple[str, dict[str, Any]], where: str) -> bool:
    kind = region[0].lower()
    if any(kind.startswith(own) for own in _WITHOUT_BOX):
        raise InputError(f"{where}: a region of type {shown(kind)} has no box: draw a rectangle instead, or delete it")
    return kind in ("rectanglelabels", "ellipselabels", "polygonlabels", "labels")


def _object(region: tuple[str, dict[str, Any]], width: int, height: int, where: str) -> LabelledObject:
    kind, value = region
    names = value.get(kind)
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise InputError(f"{where}: a region needs one label, found {shown(names)}")
    if "points" in value:
        points = value.get("points")
        if not isinstance(points, list) or len(points) < 3:
            raise InputError(f"{where}: a polygon ({names[0]}) needs three points or more")
        corners = [_numbers(dict(zip("xy", point, strict=False)) if isinstance(point, list) else {}, "xy", where)
                   for point in points]  # fmt: skip
        outline = [part for x, y in corners for part in (x * width / 100, y * height / 100)]
        return LabelledObject(names[0], box_around([outline]), [outline])
    angle = value.get("rotation", 0)
    if not is_coordinate(angle):
        raise InputError(f"{where}: rotation is {shown(angle)}, not a number")
    if "radiusX" in value:
        x, y, rx, ry = _numbers(value, ("x", "y", "radiusX", "radiusY"), where)
        centre, radii = (x * width / 100, y * height / 100), (rx * width / 100, ry * height / 100)
        return LabelledObject(names[0], box_around_ellipse(centre, radii, math.radians(angle)))
    x, y, w, h = _numbers(value, ("x", "y", "width", "height"), where)
    box = x * width / 100, y * height / 100, w * width / 100, h * height / 100
    return LabelledObject(names[0], _turned(box, math.radians(angle)) if angle else box)


def _numbers(value: dict[str, Any], keys: Any, where: str) -> Iterator[float]:
    for key in keys:
        number = value.get(key)
        if not is_coordinate(number):
            raise InputError(f"{where}: {key} is {shown(number)}, not a number")
        yield float(number)


def _turned(box: tuple[float, float, float, float], angle: float) -> tuple[float, float, float, float]:
    """The box around a box that is turned about its upper left corner, by an angle in radians."""
    x, y, width, height = box
    cosine, sine = math.cos(angle), math.sin(angle)
    corners = [(0.0, 0.0), (width, 0.0), (width, height), (0.0, height)]
    return box_around([[v for a, b in corners for v in (x + a * cosine - b * sine, y + a * sine + b * cosine)]])
