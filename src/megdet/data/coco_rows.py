"""The raw rows of a COCO instances file, and the faults that a row can have.

Segmentations are skipped while the file is decoded; `megdet.data.segmentations` reads them.
"""

from pathlib import Path
from typing import Annotated, Any, TypeGuard

import msgspec

from megdet.errors import InputError, shown
from megdet.files import LARGEST_JSON, parse_json, read_bytes

MARK = b"\xef\xbb\xbf"
"""The byte-order mark that some editors put at the start of a UTF-8 file."""

Number = Annotated[float, msgspec.Meta(gt=-1e30, lt=1e30)]
"""A number of pixels: finite, and small enough that areas are finite too."""
Length = Annotated[float, msgspec.Meta(ge=0, lt=1e30)]
"""A side of a box, or an area."""


class ImageRow(msgspec.Struct, gc=False):
    """An image as in the file: values of any type, None if missing."""

    id: Any = None
    file_name: Any = None
    width: Any = None
    height: Any = None


class ObjectRow(msgspec.Struct, gc=False):
    """An annotation as in the file: values of any type, None if missing."""

    id: Any = None
    image_id: Any = None
    category_id: Any = None
    bbox: Any = None
    area: Any = None
    iscrowd: Any = None


class CategoryRow(msgspec.Struct, gc=False):
    """A category as in the file: values of any type, None if missing."""

    id: Any = None
    name: Any = None


class CocoRows(msgspec.Struct):
    """A file of the right structure; its rows are not checked."""

    images: list[ImageRow]
    annotations: list[ObjectRow]
    categories: list[CategoryRow]


def decode(file: Path, content: bytes) -> object:
    """The `CocoRows` of a file's bytes, or the plain JSON value if the structure is another.

    Raises InputError.
    """
    try:
        return _DECODER.decode(content.removeprefix(MARK))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return parse_json(content, str(file))  # its error says where the JSON is broken


def content_of(file: Path) -> bytes:
    """The bytes of a file. Raises InputError."""
    return read_bytes(file, LARGEST_JSON)


def refusal(
    file: Path, fault: str, image_id: object = None, annotation_id: object = None, *, verb: str = "data check"
) -> InputError:
    """The InputError for a fault of a COCO file, at the given ids; `verb` is the command that lists all such faults."""
    where = f", image {shown(image_id)}" if image_id is not None else ""
    where += f", annotation {shown(annotation_id)}" if annotation_id is not None else ""
    return InputError(f"{file}{where}: {fault}; run `megdet {verb}` to see every problem of this file")


def image_fault(image: ImageRow) -> str:
    """What is wrong with an image row besides its id; empty if nothing."""
    if not isinstance(image.file_name, str) or not image.file_name:
        return "the image has no 'file_name'"
    return declared_fault(image)


def declared_fault(image: ImageRow) -> str:
    """What is wrong with the height and width of an image row; empty if nothing."""
    for key, value in (("width", image.width), ("height", image.height)):
        if value is not None and not is_number(value):
            return f"its {key} is {shown(value)}, not a number of pixels"
    return ""


def declared_size(image: ImageRow) -> tuple[float, float]:
    """Height and width of an image row, NaN if missing or invalid."""
    height, width = (float(value) if is_number(value) else float("nan") for value in (image.height, image.width))
    return height, width


def box_fault(bbox: object) -> str:
    """What is wrong with a `bbox`, which must be four finite numbers x, y, width, height; empty if nothing."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return "bbox is not a list of four numbers x, y, width, height" if bbox is not None else "bbox is missing"
    if not all(is_number(value) for value in bbox):
        return f"bbox {shown(bbox)} has a value that is not a finite number"
    if bbox[2] < 0 or bbox[3] < 0:
        return f"bbox {shown(bbox)} has a negative width or height"
    return ""


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a finite number (booleans are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def is_id(value: object) -> TypeGuard[int | str]:
    """Whether a JSON value can be the id of an image or an annotation."""
    return type(value) in (int, str)


def crowd_fault(value: object) -> str:
    """What is wrong with an `iscrowd`; empty if nothing."""
    return "" if value in (None, 0, 1) else f"iscrowd is {shown(value)}, not 0 or 1"


def area_fault(value: object) -> str:
    """What is wrong with an `area`; empty if nothing."""
    is_sound = value is None or (is_number(value) and value >= 0)
    return "" if is_sound else f"area is {shown(value)}, not a number of square pixels"


_DECODER = msgspec.json.Decoder(CocoRows)
