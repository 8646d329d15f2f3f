"""Every problem of a data set at once, for `megdet data check`; `load_coco` stops at the first fatal one."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megdet.data.coco import EDGE_TOLERANCE, box_fault, is_id, is_number, is_sized_before_exif, size_fault
from megdet.data.image import Header, read_header, read_image
from megdet.errors import InputError
from megdet.files import is_file, read_json

_THREADS = 8


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data set."""

    kind: str
    """what sort of problem, one of a few fixed phrases, to count by"""
    fatal: bool
    """whether training refuses the data set because of it; otherwise a warning"""
    file: Path
    """the annotations file or the image"""
    image_id: int | str | None
    annotation_id: int | str | None
    message: str
    """one line"""


def check_dataset(annotations_file: Path, image_folder: Path) -> list[Problem]:
    """All problems of a COCO instances file and its images, fatal ones first; every image is decoded.

    Never raises for bad data: what cannot be read is a problem too.
    """
    try:
        document = read_json(annotations_file)
    except InputError as error:
        return [Problem("unreadable annotations", True, annotations_file, None, None, str(error))]
    checker = _Checker(annotations_file, image_folder)
    checker.check(document)
    return sorted(checker.problems, key=lambda problem: not problem.fatal)


class _Checker:
    """Collects problems; what later checks need of the sound rows is kept in tables by id."""

    def __init__(self, annotations_file: Path, image_folder: Path) -> None:
        self.file = annotations_file
        self.folder = image_folder
        self.problems: list[Problem] = []
        self.images: dict[int | str, dict[str, Any]] = {}
        self.headers: dict[int | str, Header] = {}
        self.names: dict[int | str, str] = {}

    def check(self, document: object) -> None:
        if not isinstance(document, dict):
            self._add("wrong structure", "the JSON is not an object with images, annotations and categories")
            return
        tables = {key: list(self._rows(document, key)) for key in ("categories", "images", "annotations")}
        self._check_categories(tables["categories"])
        self._check_images(tables["images"])
        self._check_files()
        self._check_annotations(tables["annotations"])

    def _add(
        self,
        kind: str,
        message: str,
        *,
        fatal: bool = True,
        file: Path | None = None,
        at: tuple[object, object] = (None, None),
    ) -> None:
        """Note a problem; `at` is an image id and an annotation id as they stand in the file, of any type."""
        image_id, annotation_id = (value if is_id(value) else None for value in at)
        self.problems.append(Problem(kind, fatal, file or self.file, image_id, annotation_id, message))

    def _rows(self, document: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
        rows = document.get(key)
        if not isinstance(rows, list):
            self._add("wrong structure", f"'{key}' is {'missing' if key not in document else 'not a list'}")
            return
        for index, row in enumerate(rows):
            if isinstance(row, dict):
                yield row
            else:
                self._add("wrong structure", f"{key}[{index}] is not an object")

    def _check_categories(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            number, name = row.get("id"), row.get("name")
            if type(number) is not int or not isinstance(name, str):
                self._add("bad category", f"category {row} needs an integer 'id' and a string 'name'")
            elif number in self.names:
                self._add("duplicate category id", f"two categories have the id {number}")
            else:
                if name in self.names.values():
                    self._add("duplicate category name", f"two categories are called {name!r}", fatal=False)
                self.names[number] = name
        if not self.names:
            self._add("no categories", "there is no category to detect")

    def _check_images(self, rows: list[dict[str, Any]]) -> None:
        names: dict[str, object] = {}
        for row in rows:
            image_id, name = row.get("id"), row.get("file_name")
            if not is_id(image_id):
                self._add("bad image id", f"the image {name!r} has the id {image_id!r}, no integer and no string")
                continue
            if image_id in self.images:
                self._add("duplicate image id", f"two images have the id {image_id!r}", at=(image_id, None))
                continue
            self.images[image_id] = row
            if not isinstance(name, str) or not name:
                self._add("missing file name", "the image has no 'file_name'", at=(image_id, None))
            elif name in names:
                message = f"the file {name!r} is also image {names[name]!r}"
                self._add("duplicate file name", message, fatal=False, at=(image_id, None))
            else:
                names[name] = image_id
        if not rows:
            self._add("no images", "there is no image in this file")

    def _check_files(self) -> None:
        def look(image_id: int | str) -> tuple[str, str, Header | None]:
            path = self.folder / self.images[image_id]["file_name"]
            try:
                if not is_file(path):
                    return "missing file", f"no such file in {self.folder}", None
                header = read_header(path)
                read_image(path)
            except InputError as error:
                return "unreadable image", str(error), None
            fault = size_fault(self.images[image_id], header)
            return ("size disagrees" if fault else ""), fault, header

        named = [i for i, row in self.images.items() if isinstance(row.get("file_name"), str) and row["file_name"]]
        with ThreadPoolExecutor(_THREADS) as pool:
            for image_id, (kind, message, header) in zip(named, pool.map(look, named), strict=True):
                if kind:
                    self._add(kind, message, file=self.folder / self.images[image_id]["file_name"], at=(image_id, None))
                if header is not None:
                    self.headers[image_id] = header

    def _check_annotations(self, rows: list[dict[str, Any]]) -> None:
        seen: set[object] = set()
        boxes: set[object] = set()
        class_counts: Counter[object] = Counter()
        image_counts: Counter[object] = Counter()
        for row in rows:
            number, image_id, category = row.get("id"), row.get("image_id"), row.get("category_id")
            at = (image_id, number)
            if not is_id(number):
                self._add("bad annotation id", f"the id {number!r} is no integer and no string", at=at)
            elif number in seen:
                self._add("duplicate annotation id", f"two annotations have the id {number!r}", at=at)
            seen.add(number if is_id(number) else None)
            if not is_id(image_id) or image_id not in self.images:
                self._add("unknown image id", f"image_id {image_id!r} is not among the images", at=at)
                continue
            image_counts[image_id] += 1
            if type(category) is not int or category not in self.names:
                self._add("unknown category id", f"category_id {category!r} is not among the categories", at=at)
            else:
                class_counts[category] += 1
            if row.get("iscrowd") not in (None, 0, 1):
                self._add("bad iscrowd", f"iscrowd is {row['iscrowd']!r}, not 0 or 1", at=at)
            area = row.get("area")
            if area is not None and not (is_number(area) and area >= 0):
                self._add("bad area", f"area is {area!r}, not a number of square pixels", at=at)
            fault = box_fault(row.get("bbox"))
            if fault:
                self._add("bad box", fault, at=at)
                continue
            key = (image_id, repr(category), *row["bbox"])
            if key in boxes:
                self._add("duplicate box", f"the same box {row['bbox']} of the same category", fatal=False, at=at)
            boxes.add(key)
            self._check_box(row["bbox"], image_id, number)
        for category, name in self.names.items():
            if not class_counts[category]:
                self._add("empty class", f"category {category} ({name!r}) has no annotation", fatal=False)
        num_empty = sum(not image_counts[image_id] for image_id in self.images)
        if num_empty:
            message = f"{num_empty} of {len(self.images)} images have no annotation"
            self._add("images without annotations", message, fatal=False)

    def _check_box(self, bbox: list[int | float], image_id: int | str, number: object) -> None:
        x, y, width, height = bbox
        at = (image_id, number)
        if width == 0 or height == 0:
            self._add("zero-area box", f"bbox {bbox} has no area, training drops it", fatal=False, at=at)
        elif width <= 1 or height <= 1:
            self._add("tiny box", f"bbox {bbox} is a pixel wide or high, or less: a stray click?", fatal=False, at=at)
        header = self.headers.get(image_id)
        if header is None:
            return
        right, bottom = x + width, y + height
        is_beyond = right > header.width + EDGE_TOLERANCE or bottom > header.height + EDGE_TOLERANCE
        picture = f"the {header.width} x {header.height} image"
        if is_beyond and is_sized_before_exif(self.images[image_id], header):
            message = f"bbox {bbox} does not fit {picture}: boxes and size are those before its EXIF rotation"
            self._add("box before EXIF rotation", message, at=at)
        elif right <= 0 or bottom <= 0 or x >= header.width or y >= header.height:
            message = f"bbox {bbox} lies outside {picture}, training drops it"
            self._add("box outside the image", message, fatal=False, at=at)
        elif is_beyond or min(x, y) < -EDGE_TOLERANCE:
            message = f"bbox {bbox} reaches out of {picture}, training clips it"
            self._add("box reaches out of the image", message, fatal=False, at=at)
