"""Every problem of a data set at once, for `megdet data check`; `load_coco` stops at the first fatal one."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import msgspec

from megdet.data.coco import EDGE_TOLERANCE, is_sized_before_exif, name_fault, size_fault
from megdet.data.coco_rows import (
    CategoryRow,
    CocoRows,
    ImageRow,
    ObjectRow,
    area_fault,
    box_fault,
    content_of,
    crowd_fault,
    declared_fault,
    declared_size,
    decode,
    is_id,
)
from megdet.data.far.folder import FarFile, ImageFile, ImageFolder
from megdet.data.far.opening import far_content
from megdet.data.image import MAX_PIXELS, Header, pixels_fault, read_header, read_image
from megdet.data.room import Room
from megdet.data.segmentations import OutlineRow, outline_rows, place_fault, segmentation_fault
from megdet.errors import InputError, shown

_THREADS = 8
_PIXELS_AT_ONCE = MAX_PIXELS
"""Pixels of the images that are decoded at the same time; a larger image is decoded alone."""

_Row = TypeVar("_Row", CategoryRow, ImageRow, ObjectRow)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data set."""

    kind: str
    """what sort of problem, one of a few fixed phrases, to count by"""
    fatal: bool
    """whether training refuses the data set because of it; otherwise a warning"""
    file: ImageFile
    """the annotations file or the image"""
    image_id: int | str | None
    annotation_id: int | str | None
    message: str
    """one line"""


def check_dataset(
    annotations_file: Path,
    image_folder: ImageFolder,
    *,
    max_pixels: int = MAX_PIXELS,
    allow_outside_files: bool = False,
    with_masks: bool = False,
) -> list[Problem]:
    """All problems of a COCO instances file and of its images, fatal ones first; every image is decoded.

    Never raises for bad data: a file that cannot be read is a problem too. The arguments are those of `load_coco`;
    without masks, problems of segmentations are warnings.
    """
    try:
        content = content_of(annotations_file)
        rows = decode(annotations_file, content)
    except InputError as error:
        message = str(error).removeprefix(str(annotations_file)).lstrip(": ")  # a problem names its file already
        return [Problem("unreadable annotations", True, annotations_file, None, None, message)]
    checker = _Checker(annotations_file, image_folder, max_pixels, allow_outside_files)
    checker.check(rows)
    if isinstance(rows, CocoRows):
        checker.check_segmentations(outline_rows(content), are_needed=with_masks)
    return sorted(checker.problems, key=lambda problem: not problem.fatal)


def _fetched(file: FarFile) -> BytesIO:
    """A far file, fetched once. Raises InputError."""
    try:
        return BytesIO(far_content(file))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


class _Checker:
    """Collects problems; keeps the sound rows in tables by id for later checks."""

    def __init__(
        self, annotations_file: Path, image_folder: ImageFolder, max_pixels: int, allow_outside_files: bool
    ) -> None:
        self.file = annotations_file
        self.folder = image_folder
        self.max_pixels, self.allow_outside_files = max_pixels, allow_outside_files
        self.problems: list[Problem] = []
        self.images: dict[int | str, ImageRow] = {}
        self.headers: dict[int | str, Header] = {}
        self.names: dict[int, str] = {}

    def check(self, document: object) -> None:
        if isinstance(document, CocoRows):
            categories, images, objects = document.categories, document.images, document.annotations
        elif isinstance(document, dict):
            categories = [*self._rows(document, "categories", CategoryRow)]
            images = [*self._rows(document, "images", ImageRow)]
            objects = [*self._rows(document, "annotations", ObjectRow)]
        else:
            self._add("wrong structure", "the JSON is not an object with images, annotations and categories")
            return
        self._check_categories(categories)
        self._check_images(images)
        self._check_files()
        self._check_annotations(objects)

    def check_segmentations(self, rows: Sequence[OutlineRow], *, are_needed: bool) -> None:
        num_missing = 0
        for row in rows:
            at, value = (row.image_id, row.id), row.value()
            header = self.headers.get(row.image_id) if is_id(row.image_id) else None
            fault = segmentation_fault(value)
            if not fault and value and header is not None:
                fault = place_fault(value, header[:2])
            if fault:
                self._add("bad segmentation", fault, fatal=are_needed, at=at)
            elif not value:
                num_missing += 1
                if are_needed:
                    self._add("no segmentation", "the object has no segmentation", at=at)
        if not are_needed and 0 < num_missing < len(rows):
            message = f"{num_missing} of {len(rows)} objects have no segmentation, a detector with masks refuses them"
            self._add("no segmentation", message, fatal=False)

    def _add(
        self,
        kind: str,
        message: str,
        *,
        fatal: bool = True,
        file: ImageFile | None = None,
        at: tuple[object, object] = (None, None),
    ) -> None:
        """Add a problem; `at` is an image id and an annotation id as they are in the file, of any type."""
        image_id, annotation_id = (value if is_id(value) else None for value in at)
        self.problems.append(Problem(kind, fatal, file or self.file, image_id, annotation_id, message))

    def _rows(self, document: dict[str, object], key: str, kind: type[_Row]) -> Iterator[_Row]:
        rows = document.get(key)
        if not isinstance(rows, list):
            self._add("wrong structure", f"'{key}' is {'missing' if key not in document else 'not a list'}")
            return
        for index, row in enumerate(rows):
            if isinstance(row, dict):
                yield msgspec.convert(row, kind)
            else:
                self._add("wrong structure", f"{key}[{index}] is not an object")

    def _check_categories(self, rows: list[CategoryRow]) -> None:
        for row in rows:
            number, name = row.id, row.name
            if type(number) is not int or not isinstance(name, str):
                what = {"id": number, "name": name}
                self._add("bad category", f"category {shown(what)} needs an integer 'id' and a string 'name'")
            elif number in self.names:
                self._add("duplicate category id", f"two categories have the id {number}")
            else:
                if name in self.names.values():
                    self._add("duplicate category name", f"two categories are called {shown(name)}", fatal=False)
                self.names[number] = name
        if not self.names:
            self._add("no categories", "there is no category to detect")

    def _check_images(self, rows: list[ImageRow]) -> None:
        names: dict[str, object] = {}
        for row in rows:
            image_id, name = row.id, row.file_name
            if not is_id(image_id):
                self._add(
                    "bad image id", f"the image {shown(name)} has the id {shown(image_id)}, no integer and no string"
                )
                continue
            if image_id in self.images:
                self._add("duplicate image id", f"two images have the id {shown(image_id)}", at=(image_id, None))
                continue
            self.images[image_id] = row
            if fault := declared_fault(row):
                self._add("bad image size", fault, at=(image_id, None))
            if not isinstance(name, str) or not name:
                self._add("missing file name", "the image has no 'file_name'", at=(image_id, None))
            elif name in names:
                message = f"the file {shown(name)} is also image {shown(names[name])}"
                self._add("duplicate file name", message, fatal=False, at=(image_id, None))
            else:
                names[name] = image_id
        if not rows:
            self._add("no images", "there is no image in this file")

    def _check_files(self) -> None:
        room = Room(_PIXELS_AT_ONCE)

        def look(image_id: int | str) -> tuple[str, str, Header | None]:
            row = self.images[image_id]
            if fault := name_fault(row.file_name, self.folder, allow_outside=self.allow_outside_files):
                return "file outside the image folder", fault, None
            path = self.folder / row.file_name
            try:
                if isinstance(path, Path):
                    path.stat()
            except (OSError, ValueError):  # a name that no file can have, too
                return "missing file", f"no such file in {self.folder}", None
            try:
                source = path if isinstance(path, Path) else _fetched(path)
                header = read_header(source)
                if fault := pixels_fault(header.height, header.width, self.max_pixels):
                    return "too many pixels", fault, header
                with room.taken(header.height * header.width):
                    read_image(source, size=header[:2])
            except InputError as error:
                return "unreadable image", str(error).replace("the image: ", f"{path}: ", 1), None
            fault = size_fault(declared_size(row), header)
            return ("size disagrees" if fault else ""), fault, header

        named = [i for i, row in self.images.items() if isinstance(row.file_name, str) and row.file_name]
        with ThreadPoolExecutor(_THREADS) as pool:
            looks = [*pool.map(look, named)]
        if len(named) > 1 and all(kind == "missing file" for kind, _, _ in looks):  # one line instead of one an image
            first = shown(self.images[named[0]].file_name)
            message = f"none of the {len(named)} images is in {self.folder}, the first is {first}; wrong image folder?"
            self._add("missing files", message)
            return
        for image_id, (kind, message, header) in zip(named, looks, strict=True):
            if kind:
                self._add(kind, message, file=self.folder / self.images[image_id].file_name, at=(image_id, None))
            if header is not None:
                self.headers[image_id] = header

    def _check_annotations(self, rows: list[ObjectRow]) -> None:
        seen: set[object] = set()
        boxes: set[object] = set()
        class_counts: Counter[object] = Counter()
        image_counts: Counter[object] = Counter()
        for row in rows:
            number, image_id, category = row.id, row.image_id, row.category_id
            at = (image_id, number)
            if not is_id(number):
                self._add("bad annotation id", f"the id {shown(number)} is no integer and no string", at=at)
            elif number in seen:
                self._add("duplicate annotation id", f"two annotations have the id {shown(number)}", at=at)
            seen.add(number if is_id(number) else None)
            if not is_id(image_id) or image_id not in self.images:
                self._add("unknown image id", f"image_id {shown(image_id)} is not among the images", at=at)
                continue
            image_counts[image_id] += 1
            if type(category) is not int or category not in self.names:
                self._add("unknown category id", f"category_id {shown(category)} is not among the categories", at=at)
            else:
                class_counts[category] += 1
            if fault := crowd_fault(row.iscrowd):
                self._add("bad iscrowd", fault, at=at)
            if fault := area_fault(row.area):
                self._add("bad area", fault, at=at)
            if fault := box_fault(row.bbox):
                self._add("bad box", fault, at=at)
                continue
            key = (image_id, repr(category), *row.bbox)
            if key in boxes:
                self._add("duplicate box", f"the same box {shown(row.bbox)} of the same category", fatal=False, at=at)
            boxes.add(key)
            self._check_box(row.bbox, image_id, number)
        for category, name in self.names.items():
            if not class_counts[category]:
                self._add("empty class", f"category {category} ({shown(name)}) has no annotation", fatal=False)
        num_empty = sum(not image_counts[image_id] for image_id in self.images)
        if num_empty:
            message = f"{num_empty} of {len(self.images)} images have no annotation"
            self._add("images without annotations", message, fatal=False)

    def _check_box(self, bbox: list[int | float], image_id: int | str, number: object) -> None:
        x, y, width, height = bbox
        at = (image_id, number)
        if width == 0 or height == 0:
            self._add("zero-area box", f"bbox {shown(bbox)} has no area, training drops it", fatal=False, at=at)
        elif width <= 1 or height <= 1:
            self._add(
                "tiny box", f"bbox {shown(bbox)} is a pixel wide or high, or less: a stray click?", fatal=False, at=at
            )
        header = self.headers.get(image_id)
        if header is None:
            return
        right, bottom = x + width, y + height
        is_beyond = right > header.width + EDGE_TOLERANCE or bottom > header.height + EDGE_TOLERANCE
        picture = f"the {header.width} x {header.height} image"
        if is_beyond and is_sized_before_exif(declared_size(self.images[image_id]), header):
            message = f"bbox {shown(bbox)} does not fit {picture}: boxes and size are those before its EXIF rotation"
            self._add("box before EXIF rotation", message, at=at)
        elif right <= 0 or bottom <= 0 or x >= header.width or y >= header.height:
            message = f"bbox {shown(bbox)} lies outside {picture}, training drops it"
            self._add("box outside the image", message, fatal=False, at=at)
        elif is_beyond or min(x, y) < -EDGE_TOLERANCE:
            message = f"bbox {shown(bbox)} reaches out of {picture}, training clips it"
            self._add("box reaches out of the image", message, fatal=False, at=at)
