"""Pascal VOC and YOLO labels to COCO instances files. Images are neither copied nor moved."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from megdet.data.coco import write_coco
from megdet.data.image import IMAGE_SUFFIXES, image_size
from megdet.data.voc_folder import VocFolder, find_voc, folder_splits, listed_files
from megdet.data.xml_file import parse_xml
from megdet.errors import InputError, shown
from megdet.files import read_text, typed
from megdet.plain_yaml import parse_yaml

_LARGEST_NUMBER = 1e30  # its square is finite
_Name = str | int | float | bool


class _Names(msgspec.Struct):
    """The keys of a `data.yaml` that are used."""

    names: list[_Name] | dict[str, _Name]


@dataclass(frozen=True)
class Converted:
    """One COCO file that was written, and what to use it with."""

    annotations_file: Path
    image_folder: Path
    """where the images lie, as before"""
    num_images: int
    num_boxes: int
    class_names: tuple[str, ...]


def convert_voc(
    folder: Path,
    out: Path,
    splits: Sequence[str] | None = None,
    *,
    zero_based: bool = False,
    difficult_as_crowd: bool = False,
) -> list[Converted]:
    """Write `out/annotations/<split>.json` for each split of a Pascal VOC data set; the images stay where they are.

    VOC counts pixels from 1 and includes the last, so (xmin, ymin, xmax, ymax) becomes the box (xmin - 1, ymin - 1,
    xmax, ymax): a whole image is 1 .. width in the XML and 0 .. width here. A box whose corners are one pixel is then
    1 x 1, which `megdet data check` reports. Category ids count from 1 in the order of the sorted names of all
    splits; image ids count from 1 in the order of all XML files: both mean the same in every split.

    Args:
        folder: searched with its subfolders for XML files, their images (see `VocFolder.image_of`) and
            `ImageSets/Main/*.txt`.
        out: the folder to write to.
        splits: names of files in `ImageSets/Main`; by default those of train, val, trainval and test that exist, else
            all. Without `ImageSets`, splits are folders (`SPLIT_NAMES`), or there is one split `all`.
        zero_based: coordinates count from 0 and are edges, as some tools write them: they are not changed.
        difficult_as_crowd: objects marked difficult become crowds, which are no targets and cost nothing in
            evaluation. Otherwise they are plain objects. The key `difficult` is kept either way.

    Raises:
        InputError: a file or folder is missing, malformed or ambiguous; the message names it.
    """
    found = find_voc(folder)
    members = _voc_splits(found, splits)
    parsed = {path: _read_voc_file(path) for path in found.xml_files}
    image_ids = {path: number for number, path in enumerate(parsed, start=1)}
    class_names = sorted({row["name"] for rows, _, _ in parsed.values() for row in rows})
    category_ids = {name: number for number, name in enumerate(class_names, start=1)}
    image_files = {path: found.image_of(path, parsed[path][2], split) for split in members for path in members[split]}
    _refuse_two_of_one_image(image_files)
    image_folder = Path(os.path.commonpath([path.parent for path in image_files.values()] or [found.root]))

    converted = []
    for split, files in members.items():
        images, annotations = [], []
        for path in files:
            rows, size, _ = parsed[path]
            width, height = size if min(size) > 0 else image_size(image_files[path])[::-1]
            file_name = image_files[path].relative_to(image_folder).as_posix()
            images.append({"id": image_ids[path], "file_name": file_name, "width": width, "height": height})
            for row in rows:
                x1, y1, x2, y2 = row["corners"]
                if not zero_based:
                    x1, y1 = x1 - 1, y1 - 1
                annotation = _annotation(image_ids[path], category_ids[row["name"]], x1, y1, x2 - x1, y2 - y1)
                annotation["iscrowd"] = int(difficult_as_crowd and row["difficult"])
                annotations.append({**annotation, "difficult": int(row["difficult"])})
        converted.append(_write(out / "annotations" / f"{split}.json", image_folder, images, annotations, class_names))
    return converted


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


def _voc_splits(found: VocFolder, splits: Sequence[str] | None) -> dict[str, list[Path]]:
    """The XML files of each split asked for, or of all splits."""
    listed: Mapping[str, object] = found.image_sets or folder_splits(found)
    if splits is None:
        usual = [name for name in ("train", "val", "trainval", "test") if name in listed]
        splits = usual if usual and found.image_sets else list(listed)
    for split in splits:
        if split not in listed:
            where = f"{found.root / 'ImageSets' / 'Main' / split}.txt" if found.image_sets else f"{found.root}: {split}"
            raise InputError(f"{where}: no such split; there are {', '.join(listed) or 'none'}")
    if not found.image_sets:
        return {split: folder_splits(found)[split] for split in splits}
    # the list of one class, as in VOC 2012, has a second column
    named = {split: [line.split()[0] for _, line in _lines(found.image_sets[split])] for split in splits}
    return {split: listed_files(found, split, names) for split, names in named.items()}


def _refuse_two_of_one_image(image_files: Mapping[Path, Path]) -> None:
    owner: dict[Path, Path] = {}
    for xml_file, image in image_files.items():
        if owner.setdefault(image, xml_file) != xml_file:
            raise InputError(f"{owner[image]} and {xml_file} are both of {image}: remove one of them")


def _read_voc_file(path: Path) -> tuple[list[dict[str, Any]], tuple[int, int], str]:
    """The objects of a file, its (width, height), 0 if missing, and the name of its image."""
    root = parse_xml(path)
    rows = []
    for number, element in enumerate(root.iter("object"), start=1):
        name = (element.findtext("name") or "").strip()
        if not name:
            raise InputError(f"{path}: object {number} has no name")
        corners = [_number(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        if not all(math.isfinite(value) for value in corners):
            raise InputError(f"{path}: object {number} ({name}) needs a bndbox of four numbers xmin, ymin, xmax, ymax")
        rows.append({"name": name, "corners": corners, "difficult": element.findtext("difficult", "0").strip() == "1"})
    sides = [_number(root.findtext(f"size/{key}")) for key in ("width", "height")]
    width, height = (int(side) if math.isfinite(side) else 0 for side in sides)
    return rows, (width, height), (root.findtext("filename") or "").strip() or path.stem


def convert_yolo(images: Path, labels: Path, names: Path, out: Path) -> Converted:
    """Write one COCO file of a folder of images and a folder of YOLO label files (class x y w h, relative to the size).

    An image without a label file has no objects. A line of more than five values is a polygon, whose box is taken.
    Category ids are YOLO's class numbers plus 1; image ids count from 1 in the order of the sorted paths.

    Args:
        images: searched with its subfolders.
        labels: `<path of the image>.txt` with the same subfolders.
        names: a text file with one class a line, or a `data.yaml` with `names` as a list or by number.
        out: the JSON file to write.

    Raises:
        InputError: a file or folder is missing or malformed; the message names the file and the line.
    """
    for needed in (images, labels):
        if not needed.is_dir():
            raise InputError(f"{needed}: no such folder")
    class_names = _read_names(names)
    image_rows, annotations = [], []
    for number, path in enumerate(sorted(path for path in images.rglob("*") if _is_image(path)), start=1):
        file_name = path.relative_to(images)
        height, width = image_size(path)
        image_rows.append({"id": number, "file_name": file_name.as_posix(), "width": width, "height": height})
        label_file = labels / file_name.with_suffix(".txt")
        if not label_file.is_file():
            continue
        for line_number, line in _lines(label_file):
            label, x, y, w, h, polygon = _read_yolo_line(line, f"{label_file}:{line_number}", len(class_names))
            box = ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
            annotation = _annotation(number, label + 1, *box)
            if polygon:
                scaled = zip(polygon[::2], polygon[1::2], strict=True)
                annotation["segmentation"] = [[round(v, 3) for x, y in scaled for v in (x * width, y * height)]]
            annotations.append(annotation)
    if not image_rows:
        raise InputError(f"{images}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return _write(out, images, image_rows, annotations, class_names)


def convert_yolo_folder(folder: Path, out: Path) -> list[Converted]:
    """Write `out/annotations/<split>.json` for each split of a YOLO data set in one of its usual layouts.

    The layouts: `images/<split>` with `labels/<split>`, or `<split>/images` with `<split>/labels`, or `images` with
    `labels` (one split, `all`). The class names come from `data.yaml`, another single `.yaml`, `classes.txt` or
    `obj.names`.

    Raises:
        InputError: the folder has none of these layouts or no class names, or a file is malformed.
    """
    pairs = {path.name: (path, folder / "labels" / path.name) for path in sorted((folder / "images").glob("*/"))}
    pairs = {split: pair for split, pair in pairs.items() if pair[1].is_dir()}
    pairs |= {path.parent.name: (path, path.parent / "labels") for path in sorted(folder.glob("*/images/"))}
    if not pairs and (folder / "images").is_dir():
        pairs = {"all": (folder / "images", folder / "labels")}
    if not pairs:
        raise InputError(f"{folder}: no YOLO data set: neither images/ and labels/ nor <split>/images and /labels")
    choices = [folder / "data.yaml", *sorted(folder.glob("*.y*ml")), folder / "classes.txt", folder / "obj.names"]
    names = next((path for path in choices if path.is_file()), None)
    if names is None:
        raise InputError(f"{folder}: no class names: add data.yaml with `names`, or classes.txt with a name a line")
    return [
        convert_yolo(images, labels, names, out / "annotations" / f"{split}.json")
        for split, (images, labels) in pairs.items()
    ]


def _read_names(path: Path) -> list[str]:
    if path.suffix.lower() not in (".yaml", ".yml"):
        return _checked_names(path, [line.strip() for _, line in _lines(path)])
    names = typed(parse_yaml(read_text(path), str(path)), _Names, str(path)).names
    if isinstance(names, dict):
        if names.keys() != {str(number) for number in range(len(names))}:
            raise InputError(f"{path}: `names` should be a list of class names, or names by the numbers 0, 1, 2, ...")
        names = [names[str(number)] for number in range(len(names))]
    return _checked_names(path, [str(name) for name in names])


def _checked_names(path: Path, names: list[str]) -> list[str]:
    if not names:
        raise InputError(f"{path}: no class names in this file")
    return names


def _read_yolo_line(line: str, where: str, num_classes: int) -> tuple[int, float, float, float, float, list[float]]:
    """Label, then centre and size relative to the image, then the points of a polygon if there is one."""
    label, *values = [_number(word) for word in line.split()]
    if not all(math.isfinite(value) for value in (label, *values)) or label != int(label):
        raise InputError(f"{where}: a class number and then numbers are expected, found {line.strip()!r}")
    if not 0 <= label < num_classes:
        raise InputError(f"{where}: class {int(label)} is not one of the {num_classes} names (0 to {num_classes - 1})")
    if len(values) == 4:
        if values[2] < 0 or values[3] < 0:
            raise InputError(f"{where}: negative width or height in {line.strip()!r}")
        if max(values) > 2:
            raise InputError(f"{where}: values should be relative to the image, 0 to 1; these look like pixels")
        x, y, w, h = values
        return int(label), x, y, w, h, []
    if len(values) < 6 or len(values) % 2:
        raise InputError(f"{where}: expected `class x y w h` or a polygon, found {len(values) + 1} values")
    xs, ys = values[::2], values[1::2]
    x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    return int(label), (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, values


def _number(text: str | None) -> float:
    """The number in a text; NaN if it is not a number or larger than any box."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if abs(value) <= _LARGEST_NUMBER else math.nan


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1."""
    return [(number, line) for number, line in enumerate(read_text(path).splitlines(), start=1) if line.strip()]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _annotation(image_id: int, category_id: int, x: float, y: float, w: float, h: float) -> dict[str, Any]:
    box = [round(value, 3) for value in (x, y, w, h)]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "area": round(w * h, 3), "iscrowd": 0}


def _write(
    file: Path,
    image_folder: Path,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    class_names: Sequence[str],
) -> Converted:
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
