"""CVAT's XML for images (`CVAT for images 1.1`)."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from megdet.data.formats.converted import Converted, number_of
from megdet.data.formats.image_files import ImageFiles, files_of
from megdet.data.formats.labelled import LabelledImage, LabelledObject, box_around, box_around_ellipse, write_labelled
from megdet.data.formats.xml_file import parse_xml
from megdet.errors import InputError, shown

_LARGEST = 64 << 20
"""Largest file in bytes: one has all images of a task."""


def convert_cvat(source: Path, out: Path, images: Path | None = None) -> list[Converted]:
    """Write a COCO file for each subset of the task, or for each split that the folders of the images name.

    Boxes and ellipses (the box around them, where they are rotated) and masks become boxes, polygons become boxes with
    a segmentation. Category ids follow the order of the task's labels.

    Args:
        source: the XML file, or a folder of them.
        out: the folder to write to.
        images: the folder of the images; by default that of the XML files.

    Raises:
        InputError: a file is malformed or of a video, a shape has no box (points, a line), or an image is missing.
    """
    paths = files_of(source, ".xml")
    files = ImageFiles(images or (source if source.is_dir() else source.parent))
    labelled: list[LabelledImage] = []
    names: dict[str, None] = {}
    for path in paths:
        root = parse_xml(path, _LARGEST)
        if root.tag != "annotations":
            raise InputError(f"{path}: no CVAT file: its root is <{root.tag}>, not <annotations>")
        if root.find("track") is not None:
            raise InputError(f"{path}: tracks of a video: export the task as `CVAT for images 1.1`, with its images")
        names |= dict.fromkeys((own.text or "").strip() for own in root.findall(".//labels/label/name"))
        for element in root.findall("image"):
            where = f"{path}: image {shown(element.get('name', ''))}"
            image = files.find(element.get("name", ""), where, path.parent)
            objects = [_object(own, f"{where}, {own.tag} {number}") for number, own in enumerate(_shapes(element), 1)]
            height, width = number_of(element.get("height")), number_of(element.get("width"))
            size = (int(height), int(width)) if height >= 1 and width >= 1 else None
            labelled.append(LabelledImage(image, objects, where, element.get("subset", "").strip(), size))
    if not labelled:
        raise InputError(f"{paths[0]}: no image in this file")
    names |= dict.fromkeys(sorted({own.name for image in labelled for own in image.objects}))
    return write_labelled(labelled, files, out, list(names))


def _shapes(image: ElementTree.Element) -> list[ElementTree.Element]:
    return [own for own in image if own.tag != "tag"]


def _object(element: ElementTree.Element, where: str) -> LabelledObject:
    label = element.get("label", "").strip()
    if not label:
        raise InputError(f"{where}: it has no label")
    if element.tag == "box":
        x1, y1, x2, y2 = _numbers(element, ("xtl", "ytl", "xbr", "ybr"), where)
        if x2 < x1 or y2 < y1:
            raise InputError(f"{where}: its second corner lies before the first")
        return LabelledObject(label, _around_rotated((x1, y1, x2 - x1, y2 - y1), _angle(element, where)))
    if element.tag == "ellipse":
        x, y, rx, ry = _numbers(element, ("cx", "cy", "rx", "ry"), where)
        return LabelledObject(label, box_around_ellipse((x, y), (rx, ry), _angle(element, where)))
    if element.tag == "mask":
        x, y, width, height = _numbers(element, ("left", "top", "width", "height"), where)
        return LabelledObject(label, (x, y, width, height))
    if element.tag == "polygon":
        words = element.get("points", "").replace(";", ",").split(",")
        polygon = [number_of(word) for word in words]
        if len(polygon) < 6 or len(polygon) % 2 or not all(map(math.isfinite, polygon)):
            raise InputError(f"{where}: its points should be three pairs of numbers or more, `x,y;x,y;x,y`")
        return LabelledObject(label, box_around([polygon]), [polygon])
    raise InputError(f"{where}: <{element.tag}> has no box: draw a box or a polygon instead, or delete it")


def _angle(element: ElementTree.Element, where: str) -> float:
    """The rotation of a shape about its centre, in radians."""
    return math.radians(_numbers(element, ("rotation",), where)[0]) if element.get("rotation") else 0.0


def _numbers(element: ElementTree.Element, keys: tuple[str, ...], where: str) -> list[float]:
    values = [number_of(element.get(key)) for key in keys]
    for key, value in zip(keys, values, strict=True):
        if not math.isfinite(value):
            raise InputError(f"{where}: {key} is {shown(element.get(key))}, not a number")
    return values


def _around_rotated(box: tuple[float, float, float, float], angle: float) -> tuple[float, float, float, float]:
    """The box around a box that is turned about its centre, by an angle in radians."""
    x, y, width, height = box
    cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
    w, h = width * cosine + height * sine, width * sine + height * cosine
    return x + (width - w) / 2, y + (height - h) / 2, w, h
