"""YOLO: one text file an image with `class x y width height`, relative to the image."""

import itertools
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import msgspec

from megdet.data.formats.converted import Converted, number_of, numbered_lines
from megdet.data.formats.image_files import (
    KIND_NAMES,
    FilesByName,
    ImageFiles,
    folders_below,
    split_of,
    visible_files,
)
from megdet.data.formats.labelled import LabelledImage, LabelledObject, box_around, write_labelled
from megdet.data.image import image_size
from megdet.errors import InputError, shown
from megdet.files import read_text, typed
from megdet.plain_yaml import parse_yaml

_Name = str | int | float | bool
_NAMES_FILES = ("classes.txt", "obj.names", "names.txt", "predefined_classes.txt")
_DATA_FILES = ("data.yaml", "data.yml")
_YAML = (".yaml", ".yml")
_NO_LABELS = (*_NAMES_FILES, "train.txt", "val.txt", "valid.txt", "test.txt", "readme.txt", "license.txt", "notes.txt")
"""Text files that are no labels, if no image has their name."""


class _Names(msgspec.Struct):
    """The keys of a `data.yaml` that are used."""

    names: list[_Name] | dict[str, _Name]
    kpt_shape: list[int] | None = None
    """keypoints of an object and numbers of each, in a data set of poses"""


def convert_yolo(folder: Path, out: Path, images: Path | None = None) -> list[Converted]:
    """Write `out/annotations/<split>.json` for each split of a YOLO data set, in any layout of folders.

    The label file of an image has its name and lies beside it; else in the matching folder (`labels/train` for
    `images/train`, `train/labels` for `train/images`); else it is the only one of that name that is left in the split.
    An image without a label file has no objects. A line of more than five values is a polygon, whose box is taken, or,
    where `data.yaml` has `kpt_shape`, a box and keypoints, which are left out; one of five is a box everywhere.

    Splits are folders called train, val, test and the like, at any depth, or the folders in `images` that have a
    partner in `labels`. The class names come from `data.yaml`, another single `.yaml`, `classes.txt` or `obj.names`,
    the nearest one to `folder`. Category ids are YOLO's class numbers plus 1.

    Args:
        folder: searched with its subfolders.
        out: the folder to write to.
        images: the folder of the images, if they are elsewhere.

    Raises:
        InputError: there are no labels, no images or no class names, a label file has no image, or a file is malformed.
    """
    texts = [path for path in visible_files(folder) if path.suffix.lower() == ".txt"]
    names, num_keypoint_values = read_names(_names_file(folder))
    files = ImageFiles(images or folder)
    labels = _labels_of(files, texts, folder)
    labelled = []
    for path in files.paths:
        height, width = image_size(path)
        objects = []
        for number, line in numbered_lines(labels[path]) if path in labels else ():
            label, x, y, w, h, polygon = _read_yolo_line(
                line, f"{labels[path]}:{number}", len(names), num_keypoint_values
            )
            pixels = [value * side for value, side in zip(polygon, (width, height) * (len(polygon) // 2), strict=True)]
            box = ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
            objects.append(LabelledObject(names[label], box, [pixels] if pixels else ()))
        labelled.append(LabelledImage(path, objects, str(labels.get(path, path)), _split(path, files.root, folder)))
    return write_labelled(labelled, files, out, names)


def _labels_of(files: ImageFiles, texts: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """The label file of each image that has one.

    The nearest of its name, else one elsewhere; names in another case come second, as do files that others have.
    """
    by_stem = FilesByName()
    for text in texts:
        by_stem.add(text, text.stem)
    labels: dict[Path, Path] = {}
    for is_near, called in itertools.product((True, False), (by_stem.exactly, by_stem.in_any_case)):
        taken = {*labels.values()}
        for path in files.paths:
            if path in labels:
                continue
            left = [text for text in called(path.stem) if text not in taken]
            if is_near:
                beside = [text for text in left if text.parent == path.parent]
                left = beside or [text for text in left if _part(text, folder) == _part(path, files.root)]
                if len(left) > 1:
                    raise InputError(f"{path}: its labels may be {left[0]} or {left[1]}: keep one of them")
            else:
                left = [text for text in left if split_of(text, folder) in ("", split_of(path, files.root))]
                if len(left) > 1 and called == by_stem.in_any_case:
                    raise InputError(f"{path}: its labels may be {left[0]} or {left[1]}: keep one, or put it beside")
            if len(left) == 1:
                labels[path] = left[0]
    if not labels:
        raise InputError(f"{folder}: no YOLO data set: no .txt file has the name of an image")
    _refuse_two_images(labels)
    folders = {text.parent for text in labels.values()}
    for text in sorted(set(texts) - set(labels.values())):
        is_label = text.parent in folders or "labels" in folders_below(text, folder)
        if is_label and text.name.lower() not in _NO_LABELS:
            raise InputError(
                f"{text}: no image {text.stem}.* in {files.root} or below: put it there, or delete the labels"
            )
    return labels


def _refuse_two_images(labels: Mapping[Path, Path]) -> None:
    owner: dict[Path, Path] = {}
    for path, text in labels.items():
        if owner.setdefault(text, path) != path:
            raise InputError(f"{text}: it may belong to {owner[text]} or {path}: give each a label file of its own")


def _part(path: Path, root: Path) -> tuple[str, ...]:
    """The folders of a file that tell the part of the data set."""
    return tuple(part.lower() for part in folders_below(path, root) if part.lower() not in KIND_NAMES)


def _split(path: Path, root: Path, folder: Path) -> str:
    """The split that the folders of an image name, or the folder in `images` that has a partner in `labels`."""
    parts = folders_below(path, root)
    if not split_of(path, root) and parts[:1] == ("images",) and (folder / "labels" / "".join(parts[1:2])).is_dir():
        return "".join(parts[1:2])
    return ""


def _names_file(folder: Path) -> Path:
    """The file with the class names, the nearest to the folder."""
    visible, faults = visible_files(folder), list[str]()
    deeper = (path for path in visible if path.name in (*_DATA_FILES, *_NAMES_FILES))
    others = (
        path for path in visible if path.parent == folder and path.suffix.lower() in _YAML and _has_names(path, faults)
    )
    choices = chain(
        (folder / name for name in _DATA_FILES),
        others,  # read only where the first are missing: any file may be here
        (folder / name for name in _NAMES_FILES),
        sorted(deeper, key=lambda path: (len(path.parts), path)),
    )
    names = next((path for path in choices if path.is_file()), None)
    if names is None:
        unread = f" ({faults[0]})" if faults else ""
        raise InputError(
            f"{folder}: no class names: add data.yaml with `names`, or classes.txt with a name a line{unread}"
        )
    return names


def _has_names(path: Path, faults: list[str]) -> bool:
    """Whether a YAML file has names of classes; of one that cannot be read the reason goes into `faults`."""
    try:
        content = parse_yaml(read_text(path), str(path))
        if not isinstance(content, dict) or "names" not in content:
            return False
        read_names(path)
    except InputError as error:
        faults.append(str(error))
        return False
    return True


def read_names(path: Path) -> tuple[list[str], int]:
    """The class names of a file, and how many numbers the keypoints of an object have. Raises InputError."""
    if path.suffix.lower() not in _YAML:
        lines = [line.strip() for line in read_text(path).rstrip().splitlines()]
        if "" in lines:
            raise InputError(f"{path}:{lines.index('') + 1}: an empty line among the class names, which count by lines")
        return _checked_names(path, lines), 0
    content = typed(parse_yaml(read_text(path), str(path)), _Names, str(path))
    names = content.names
    if isinstance(names, dict):
        if names.keys() != {str(number) for number in range(len(names))}:
            raise InputError(f"{path}: `names` should be a list of class names, or names by the numbers 0, 1, 2, ...")
        names = [names[str(number)] for number in range(len(names))]
    return _checked_names(path, [str(name) for name in names]), math.prod(content.kpt_shape) if content.kpt_shape else 0


def _checked_names(path: Path, names: list[str]) -> list[str]:
    if not names:
        raise InputError(f"{path}: no class names in this file")
    if (twice := next((name for place, name in enumerate(names) if name in names[:place]), None)) is not None:
        raise InputError(f"{path}: two classes are called {shown(twice)}: give each a name of its own")
    return names


def _read_yolo_line(
    line: str, where: str, num_classes: int, num_keypoint_values: int
) -> tuple[int, float, float, float, float, list[float]]:
    """Label, then centre and size relative to the image, then the points of a polygon if there is one."""
    label, *values = [number_of(word) for word in line.split()]
    if not all(math.isfinite(value) for value in (label, *values)) or label != int(label):
        raise InputError(f"{where}: a class number and then numbers are expected, found {line.strip()!r}")
    if not 0 <= label < num_classes:
        raise InputError(f"{where}: class {int(label)} is not one of the {num_classes} names (0 to {num_classes - 1})")
    if num_keypoint_values and len(values) not in (4, 4 + num_keypoint_values):
        raise InputError(
            f"{where}: expected `class x y w h`, alone or with {num_keypoint_values} values of keypoints, as "
            f"`kpt_shape` says, found {len(values) + 1} values"
        )
    if num_keypoint_values or len(values) == 4:
        values = values[:4]
        if values[2] < 0 or values[3] < 0:
            raise InputError(f"{where}: negative width or height in {line.strip()!r}")
        if max(values) > 2:
            raise InputError(f"{where}: values should be relative to the image, 0 to 1; these look like pixels")
        x, y, w, h = values
        return int(label), x, y, w, h, []
    if len(values) < 6 or len(values) % 2:
        raise InputError(f"{where}: expected `class x y w h` or a polygon, found {len(values) + 1} values")
    if max(values) > 2:
        raise InputError(f"{where}: points should be relative to the image, 0 to 1; these look like pixels")
    x, y, w, h = box_around([values])
    return int(label), x + w / 2, y + h / 2, w, h, values
