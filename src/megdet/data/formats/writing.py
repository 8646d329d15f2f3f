"""COCO data sets as Pascal VOC or YOLO, for other tools. Images are linked, or copied where links are not possible."""

import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megdet.data.annotations import Annotations
from megdet.data.coco import CocoDataset
from megdet.data.far.folder import local_folder
from megdet.data.formats.image_files import SPLIT_NAMES, composed, refuse_odd_split
from megdet.data.formats.yolo import read_names
from megdet.errors import InputError, printable, shown
from megdet.files import cannot_write, make_folder, read_text, replace_file
from megdet.plain_yaml import dump_yaml, parse_yaml

_KEYS = ("names", "path", "nc", "kpt_shape", "flip_idx", "download")
"""Of YOLO's data.yaml, beside the splits."""


@dataclass(frozen=True)
class Written:
    """What was written."""

    folder: Path
    num_images: int
    num_boxes: int
    num_crowds: int
    """crowds that were left out (YOLO) or marked difficult (VOC)"""


def write_yolo(dataset: CocoDataset, out: Path, split: str) -> Written:
    """Write `out/labels/<split>/*.txt`, `out/images/<split>` and `out/data.yaml`; other splits there stay.

    A number has eight decimals, so a box comes back to a thousandth of a pixel. Masks are not written, nor are crowds,
    which YOLO does not have.

    Raises:
        InputError: `out` has other classes or this split already, two images would share a label file, two classes
            have one name or a name cannot be printed, a file is hidden or in a folder called like another split, or a
            file cannot be written.
    """
    refuse_odd_split(split, str(dataset.annotations_file))
    if split in _KEYS:
        raise InputError(f"{dataset.annotations_file}: data.yaml has a key {split} of its own: choose another --split")
    folder = local_folder(dataset.image_folder, "data convert")
    names = list(dataset.class_names)
    yaml_file = out / "data.yaml"
    found: dict[str, Any] = {"names": names}
    if yaml_file.exists():
        if read_names(yaml_file) != (names, 0):
            fault = f"other classes than those of {dataset.annotations_file}, or keypoints"
            raise InputError(f"{yaml_file}: {fault}: choose another folder")
        found = {**parse_yaml(read_text(yaml_file), str(yaml_file)), **found}
    _refuse_odd_classes(dataset)
    _refuse_used(out / "labels" / split)
    _refuse_hidden_files(dataset)
    _refuse_other_splits(dataset, split)
    _refuse_shared(dataset)
    num_boxes = 0
    for index, name in enumerate(dataset.file_names):
        own, (height, width) = dataset.annotations[index], dataset.sizes[index].tolist()
        lines = []
        for (x1, y1, x2, y2), label in zip(*_objects(own), strict=True):
            values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{label} " + " ".join(f"{value:.8f}" for value in values) + "\n")
        num_boxes += len(lines)
        _write(out / "labels" / split / Path(name).with_suffix(".txt"), "".join(lines))
        _link(folder / name, out / "images" / split / name)
    found[split] = f"images/{split}"
    _write(yaml_file, dump_yaml(found))
    return Written(out, len(dataset), num_boxes, int(dataset.annotations.is_crowd.sum()))


def write_voc(dataset: CocoDataset, out: Path, split: str) -> Written:
    """Write `out/Annotations/*.xml`, `out/JPEGImages` and `out/ImageSets/Main/<split>.txt`; other splits there stay.

    VOC counts whole pixels from 1 and includes the last: edges are rounded, and a box keeps at least one pixel. A crowd
    is an object marked difficult, which VOC's evaluation passes over. Masks are not written.

    Raises:
        InputError: `out` has this split or one of these images already, two images would share an XML file, two classes
            have one name, a name cannot be printed or a file's begins with a dot or ends in a space, or a file cannot
            be written.
    """
    refuse_odd_split(split, str(dataset.annotations_file))
    folder = local_folder(dataset.image_folder, "data convert")
    _refuse_used(out / "ImageSets" / "Main" / f"{split}.txt")
    _refuse_odd_classes(dataset)
    _refuse_hidden_files(dataset)
    _refuse_odd_files(dataset)
    _refuse_shared(dataset)
    stems = []
    for index, name in enumerate(dataset.file_names):
        stem = Path(name).with_suffix("")
        file = out / "Annotations" / f"{stem}.xml"
        _refuse_used(file)
        height, width = dataset.sizes[index].tolist()
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = Path(name).name
        size = ElementTree.SubElement(root, "size")
        for key, value in (("width", width), ("height", height), ("depth", 3)):
            ElementTree.SubElement(size, key).text = str(value)
        own = dataset.annotations[index]
        for box, label, is_crowd in zip(own.boxes.tolist(), own.labels.tolist(), own.is_crowd.tolist(), strict=True):
            _add_object(root, dataset.class_names[label], box, (width, height), is_difficult=is_crowd)
        ElementTree.indent(root)
        _write(file, ElementTree.tostring(root, encoding="unicode") + "\n")
        _link(folder / name, out / "JPEGImages" / name)
        stems.append(stem.as_posix())
    _write(out / "ImageSets" / "Main" / f"{split}.txt", "\n".join(stems) + "\n")
    crowds = int(dataset.annotations.is_crowd.sum())
    return Written(out, len(dataset), len(dataset.annotations.boxes) - crowds, crowds)


def _add_object(
    root: ElementTree.Element, name: str, box: list[float], size: tuple[int, int], *, is_difficult: bool
) -> None:
    """Add an object with a box in an image of this width and height."""
    x1, y1, x2, y2 = (round(value) for value in box)
    x1, y1 = min(x1, size[0] - 1), min(y1, size[1] - 1)  # the one pixel of a thin box at the far edge lies in the image
    element = ElementTree.SubElement(root, "object")
    ElementTree.SubElement(element, "name").text = name
    ElementTree.SubElement(element, "difficult").text = str(int(is_difficult))
    corners = ElementTree.SubElement(element, "bndbox")
    edges = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": max(x2, x1 + 1), "ymax": max(y2, y1 + 1)}
    for key, value in edges.items():
        ElementTree.SubElement(corners, key).text = str(value)


def _objects(own: Annotations) -> tuple[list[list[float]], list[int]]:
    """Boxes and labels without crowds."""
    return own.boxes[~own.is_crowd].tolist(), own.labels[~own.is_crowd].tolist()


def _refuse_used(path: Path) -> None:
    if path.exists():
        raise InputError(f"{path} exists: choose another folder, or delete it")


def _refuse_odd_classes(dataset: CocoDataset) -> None:
    """Refuse names of classes that readers do not tell apart or cannot read; spaces around a name do not count."""
    names = [name.strip() for name in dataset.class_names]
    for number, name in zip(dataset.category_ids, names, strict=True):
        fault = ""
        if not name:
            fault = "its name is empty"
        elif not _is_printable(name):
            fault = f"its name {shown(name)} has characters that cannot be printed"
        elif (first := dataset.category_ids[names.index(name)]) != number:
            fault = f"its name {shown(name)} is that of category {first} too"
        if fault:
            raise InputError(f"{dataset.annotations_file}, category {number}: {fault}: give it a name of its own")


def _refuse_odd_files(dataset: CocoDataset) -> None:
    """Refuse names of files that XML and lists with a name a line do not have."""
    for image_id, name in zip(dataset.image_ids, dataset.file_names, strict=True):
        stem = str(Path(name).with_suffix(""))
        if stem != stem.strip() or not _is_printable(name):
            fault = f"VOC cannot have file_name {shown(name)}, for a space at its end or what cannot be printed"
            raise InputError(f"{dataset.annotations_file}, image {shown(image_id)}: {fault}: rename the file")


def _refuse_hidden_files(dataset: CocoDataset) -> None:
    """Refuse names that begin with a dot: readers pass over such files and folders."""
    for image_id, name in zip(dataset.image_ids, dataset.file_names, strict=True):
        if any(part.startswith(".") for part in Path(name).parts):
            fault = f"readers pass over file_name {shown(name)}, for the dot at a beginning"
            raise InputError(f"{dataset.annotations_file}, image {shown(image_id)}: {fault}: rename it")


def _refuse_other_splits(dataset: CocoDataset, split: str) -> None:
    """Refuse images in folders that are called like another split: for readers these are of both."""
    for image_id, name in zip(dataset.image_ids, dataset.file_names, strict=True):
        for part in Path(name).parent.parts:
            if part.lower() in SPLIT_NAMES and part != split:
                fault = f"its folder {shown(part)} is called like a split, and the split to write is {split}"
                raise InputError(
                    f"{dataset.annotations_file}, image {shown(image_id)}: {fault}: rename the folder, or give the one "
                    "below as --images and file names relative to it"
                )


def _is_printable(name: str) -> bool:
    return printable(name) == "".join(" " if character.isspace() else character for character in name)


def _refuse_shared(dataset: CocoDataset) -> None:
    """Refuse images that differ in their endings only or not at all: a label file has the name of its image."""
    stems = [composed(str(Path(name).with_suffix(""))) for name in dataset.file_names]  # as readers take them
    stem, count = Counter(stems).most_common(1)[0]
    if count == 1:
        return
    places = [place for place, own in enumerate(stems) if own == stem]
    first: dict[Path, int] = {}
    for place in places:
        name = dataset.file_names[place]
        if (before := first.setdefault(Path(name), place)) != place:
            one, other = (shown(dataset.image_ids[own]) for own in (before, place))
            raise InputError(
                f"{dataset.annotations_file}: the file {shown(name)} is image {one} and image {other}: keep one of them"
            )
    raise InputError(f"{dataset.annotations_file}: {count} images are called {shown(stem)}: rename all but one")


def _write(path: Path, text: str) -> None:
    make_folder(path.parent)
    try:
        replace_file(path, text.encode(), durable=False)
    except (OSError, UnicodeEncodeError) as error:
        raise cannot_write(path, error) from error


def _link(image: Path, link: Path) -> None:
    make_folder(link.parent)
    try:
        try:
            link.symlink_to(image.absolute())
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            shutil.copyfile(image, link)
    except OSError as error:
        raise cannot_write(link, error) from error
