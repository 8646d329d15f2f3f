"""Tables of boxes (CSV): TensorFlow's, those of Open Images, and others with a column for each corner."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megdet.data.csv_lines import csv_lines
from megdet.data.formats.converted import Converted, number_of
from megdet.data.formats.image_files import SPLIT_NAMES, ImageFiles, files_of, split_of
from megdet.data.formats.labelled import LabelledImage, LabelledObject, write_labelled
from megdet.data.image import image_size
from megdet.errors import InputError, shown

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "image": ("filename", "file_name", "imageid", "image_id", "image", "image_name", "image_path", "path"),
    "class": ("class", "labelname", "label", "class_name", "category", "name"),
    "x1": ("xmin", "x_min", "x1", "left"),
    "y1": ("ymin", "y_min", "y1", "top"),
    "x2": ("xmax", "x_max", "x2", "right"),
    "y2": ("ymax", "y_max", "y2", "bottom"),
}
"""The names that a column may have, in any case; other columns are ignored, but for width, height and isgroupof."""
_CORNERS = ("x1", "y1", "x2", "y2")
_LARGEST_PART = 2
"""Corners up to this are parts of an image, as in YOLO's files: a tool may round a little beyond 1."""


class _Row(NamedTuple):
    where: str
    image: str
    name: str
    corners: tuple[float, ...]
    size: tuple[float, float]
    """height and width; NaN if missing"""
    is_crowd: bool


def convert_csv(source: Path, out: Path, images: Path | None = None) -> list[Converted]:
    """Write a COCO file for each table, or for each split that the folders of the images name.

    A table is a split if its name begins with the name of one (`train_labels.csv` is `train`), or if there are several:
    then each belongs to the split that its folders name, or else has a split of its own, called like the file.
    Corners are pixels from 0, or parts of the image where no corner of a table is above 2. Open Images' group
    boxes (`IsGroupOf`) are crowds, and its `LabelName` is looked up in the table of class descriptions (two columns
    without a header), if one lies beside it. A row whose corners are all empty is an image without objects.

    Args:
        source: a table, or a folder of tables.
        out: the folder to write to.
        images: the folder of the images; by default that of the tables.

    Raises:
        InputError: a table is malformed, an image is missing, or it is in two tables; the message names the file and
            the line.
    """
    tables = {path: csv_lines(path) for path in files_of(source, ".csv")}
    titles = {path: _columns(records[0][1]) for path, records in tables.items() if records}
    descriptions = {
        words[0]: words[1]
        for path, records in tables.items()
        if titles.get(path) is None
        for _, words in records
        if len(words) == 2
    }
    boxes = {path: found for path, found in titles.items() if found is not None}
    if not boxes:
        wanted = "; ".join(f"{key}: {', '.join(names[:4])}" for key, names in COLUMNS.items())
        raise InputError(f"{next(iter(tables))}: its first line needs a column for each of {wanted}")
    files = ImageFiles(images or (source if source.is_dir() else source.parent))
    splits = _splits(list(boxes), source)
    labelled: list[LabelledImage] = []
    for path, columns in boxes.items():
        rows = list(_rows(path, tables[path][1:], columns, descriptions))
        labelled += _images(rows, files, path, splits[path])
    if not labelled:
        raise InputError(f"{source}: no image in it, so there is nothing to convert")
    _refuse_shared(labelled)
    return write_labelled(labelled, files, out)


def _splits(tables: Sequence[Path], source: Path) -> dict[Path, str]:
    """The split of each table, by its name or else by its folders; "" where the folders of the images tell it."""
    first = {path: path.stem.lower().replace("-", "_").split("_")[0] for path in tables}
    named = [word for word in first.values() if word in SPLIT_NAMES]
    splits = {path: word if named.count(word) == 1 else "" for path, word in first.items()}
    if len(tables) == 1:
        return splits
    return {path: split or split_of(path, source) or path.stem for path, split in splits.items()}


def _refuse_shared(labelled: Sequence[LabelledImage]) -> None:
    """Refuse an image of two tables: often one of them has all images, and the others are its parts."""
    seen: dict[Path, LabelledImage] = {}
    for own in labelled:
        before = seen.setdefault(own.path, own)
        if before.split != own.split:
            raise InputError(
                f"{own.where}: {own.path} is in {before.where} too: convert one table, its file as SOURCE, or take one "
                "of them out of the folder"
            )


def _columns(header: list[str]) -> dict[str, int] | None:
    """The place of each column that is used; None if one is missing."""
    found = {word.strip().lower(): place for place, word in reversed(list(enumerate(header)))}
    places = {key: next((found[name] for name in names if name in found), -1) for key, names in COLUMNS.items()}
    more = {name: found.get(name, -1) for name in ("width", "height", "isgroupof")}
    return None if -1 in places.values() else places | more


def _rows(
    path: Path, records: list[tuple[int, list[str]]], columns: Mapping[str, int], descriptions: Mapping[str, str]
) -> Iterator[_Row]:
    for line, words in records:
        where = f"{path}:{line}"

        def word(key: str, words: list[str] = words) -> str:
            place = columns[key]
            return words[place].strip() if 0 <= place < len(words) else ""

        if len(words) <= max(columns[key] for key in COLUMNS):
            raise InputError(f"{where}: {len(words)} fields, fewer than the first line has")
        texts = [word(key) for key in _CORNERS]
        corners = tuple(number_of(text) for text in texts) if any(texts) else ()
        name = word("class")
        if not word("image") or (corners and not name):
            raise InputError(f"{where}: the name of the {'class' if word('image') else 'image'} is empty")
        if not all(math.isfinite(value) for value in corners):
            raise InputError(f"{where}: four numbers are expected as corners, found {shown(texts)}")
        if corners and (corners[2] < corners[0] or corners[3] < corners[1]):
            raise InputError(f"{where}: the second corner lies before the first: {shown(texts)}")
        size = number_of(word("height")), number_of(word("width"))
        yield _Row(where, word("image"), descriptions.get(name, name), corners, size, word("isgroupof") == "1")


def _images(rows: list[_Row], files: ImageFiles, path: Path, split: str) -> Iterator[LabelledImage]:
    are_parts = max((value for row in rows for value in row.corners), default=math.inf) <= _LARGEST_PART
    by_image: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        by_image[row.image].append(row)
    for named, own in by_image.items():
        image = files.find(named, own[0].where, path.parent)
        declared = own[0].size
        size = (int(declared[0]), int(declared[1])) if all(side >= 1 for side in declared) else None
        height, width = image_size(image) if are_parts else (1, 1)
        objects = [
            LabelledObject(row.name, (x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height), (), row.is_crowd)
            for row in own
            if row.corners
            for x1, y1, x2, y2 in [row.corners]
        ]
        yield LabelledImage(image, objects, own[0].where, split, size)
