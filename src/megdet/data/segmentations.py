"""The segmentations of a COCO file in columns: polygons, or runs of pixels (RLE). Read only if masks are asked for.

The columns have a cache file of their own. It is memory-mapped, so that all processes of a host share its memory.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from megdet.data.coco_rows import MARK, Number, is_number, refusal
from megdet.data.columns import Columns, map_columns, text_column, text_of
from megdet.data.rle import runs_of_text
from megdet.errors import shown

FORMAT = "1"
"""Version of the columns; raise it when their meaning changes."""

_AT_ONCE = 1024
"""Objects that are Python numbers at the same time, several times as large as in a column."""
_LONGEST_OUTLINE = 1e7
"""Pixels of the longest outline of an object: the COCO API takes a hundred bytes for each."""
_MOST_PIXELS = (1 << 31) - 1
"""Pixels of the longest run and of the longest edge."""


class Segmentation(NamedTuple):
    """The segmentation of one object, in pixels of its image file; without polygons and runs if the file has none."""

    polygons: tuple[NDArray[np.float32], ...]
    """(points, 2) each: x, y; the object is the union of the polygons"""
    runs: NDArray[np.int32]
    """runs over the whole image, as in `megdet.data.rle`"""


@dataclass(frozen=True)
class Segmentations:
    """The segmentations of all objects, in the order of the file."""

    vertices: NDArray[np.float32]
    """(points, 2): x, y of all polygons"""
    vertices_ends: NDArray[np.int64]
    """(polygons,): end index of each polygon in the points"""
    polygons_ends: NDArray[np.int64]
    """(objects,): end index of each object in the polygons"""
    bounds: NDArray[np.float32]
    """(objects, 4): x1, y1, x2, y2 around the polygons; zeros without polygons"""
    runs: NDArray[np.int32]
    runs_ends: NDArray[np.int64]
    """(objects,): end index of each object in the runs"""
    rle_sizes: NDArray[np.int32]
    """(objects, 2): height and width of each RLE in the file; zeros without runs"""
    digest: str
    """SHA-256 of all columns"""
    file: Path | None = None
    """the file that the columns are mapped from; it outlives them unless a user deletes it"""

    def __len__(self) -> int:
        return len(self.polygons_ends)

    def __getitem__(self, place: int) -> Segmentation:
        first = self.polygons_ends[place - 1] if place else 0
        ends = self.vertices_ends[first : self.polygons_ends[place]].tolist()
        starts = [int(self.vertices_ends[first - 1]) if first else 0, *ends[:-1]]
        run = self.runs_ends[place - 1] if place else 0
        polygons = tuple(self.vertices[start:end] for start, end in zip(starts, ends, strict=False))
        return Segmentation(polygons, self.runs[run : self.runs_ends[place]])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the path of the mapped file if it still exists: another process maps it too."""
        file = self.shared_file()
        return (mapped, (file,)) if file else (unpacked, (self.packed(),))

    @property
    def is_missing(self) -> NDArray[np.bool_]:
        """(objects,): whether the file has no segmentation for an object."""
        num_polygons, num_runs = (np.diff(ends, prepend=0) for ends in (self.polygons_ends, self.runs_ends))
        return np.asarray((num_polygons == 0) & (num_runs == 0))

    def areas(self) -> NDArray[np.float64]:
        """(objects,): square pixels inside the polygons (overlaps counted twice), or pixels of the runs."""
        x, y = self.vertices.astype(np.float64).T
        following = np.arange(1, len(x) + 1)
        following[self.vertices_ends - 1] = self.vertices_ends - np.diff(self.vertices_ends, prepend=0)
        twice = _sums(x * y[following] - x[following] * y, self.vertices_ends)
        lengths = np.diff(self.runs_ends, prepend=0)
        is_own = (np.arange(len(self.runs)) - np.repeat(self.runs_ends - lengths, lengths)) % 2 == 1
        of_polygons = _sums(np.abs(twice) / 2, self.polygons_ends)
        return np.asarray(of_polygons + _sums(self.runs * is_own, self.runs_ends), np.float64)

    def packed(self) -> Columns:
        """The columns in the form for a file; `unpacked` reads it."""
        return {
            "vertices": self.vertices,
            "vertices.ends": self.vertices_ends,
            "polygons.ends": self.polygons_ends,
            "bounds": self.bounds,
            "runs": self.runs,
            "runs.ends": self.runs_ends,
            "rle_sizes": self.rle_sizes,
            "digest": text_column(self.digest),
        }

    def shared_file(self) -> Path | None:
        """The file that these columns are mapped from; None if it is gone or has changed."""
        if self.file is not None:
            with suppress(OSError, ValueError, KeyError):
                if text_of(map_columns(self.file)[0]["digest"]) == self.digest:
                    return self.file
        return None


def unpacked(columns: Columns, file: Path | None = None) -> Segmentations:
    """The segmentations of `packed` columns; `file` is the file they are mapped from."""
    return Segmentations(
        vertices=columns["vertices"],
        vertices_ends=columns["vertices.ends"],
        polygons_ends=columns["polygons.ends"],
        bounds=columns["bounds"],
        runs=columns["runs"],
        runs_ends=columns["runs.ends"],
        rle_sizes=columns["rle_sizes"],
        digest=text_of(columns["digest"]),
        file=file,
    )


def mapped(file: Path) -> Segmentations:
    """The segmentations in a file, mapped. Raises OSError; ValueError or KeyError if it is not such a file."""
    return unpacked(map_columns(file)[0], file)


def segmentation_fault(value: object) -> str:
    """What is wrong with a `segmentation`, empty if nothing; None and an empty list count as no segmentation."""
    if isinstance(value, dict):
        return _rle_fault(value.get("size"), value.get("counts"))
    if value is not None and not isinstance(value, list):
        return f"segmentation is {shown(value)}, neither a list of polygons nor an RLE"
    for polygon in value or []:
        if not isinstance(polygon, list):
            return f"segmentation has {shown(polygon)} in the place of a polygon, which is a list x, y, x, y, ..."
        if not all(is_number(number) for number in polygon):
            return f"segmentation has a polygon {shown(polygon)} with a value that is not a finite number"
        if len(polygon) % 2:
            return f"segmentation has a polygon {shown(polygon)} of {len(polygon)} numbers: x and y must be pairs"
        if len(polygon) < 6:
            return f"segmentation has a polygon {shown(polygon)} of {len(polygon) // 2} points, it takes 3"
    return outline_fault(value or [])


def outline_fault(polygons: Sequence[Sequence[int | float]]) -> str:
    """Why valid polygons of an object cannot be rasterised (too long an outline for the memory); empty if they can."""
    length = sum(_length(np.array(polygon, np.float64).reshape(-1, 2)) for polygon in polygons)
    if length <= _LONGEST_OUTLINE:
        return ""
    return f"segmentation has polygons whose outline is {length:.3g} pixels long, more than 10 million"


def _rle_fault(size: object, counts: object) -> str:
    if not isinstance(size, list) or len(size) != 2 or not all(_is_count(edge) and edge for edge in size):
        return f"segmentation is an RLE of size {shown(size)}, which is not height and width in pixels"
    if isinstance(counts, str):
        decoded = runs_of_text(counts)
        if decoded is None:
            return f"segmentation is an RLE whose counts {shown(counts)} are no compressed runs"
        runs = decoded.tolist()
    elif isinstance(counts, list):
        runs = counts
    else:
        return f"segmentation is an RLE whose counts are {shown(counts)}, neither a list nor compressed runs"
    if not all(_is_count(run) for run in runs):
        return f"segmentation is an RLE whose counts {shown(counts)} are not all whole numbers of pixels"
    if sum(runs) != size[0] * size[1]:
        return f"segmentation is an RLE whose counts add up to {sum(runs)} pixels, not to {size[0]} x {size[1]}"
    return ""


def _length(points: NDArray[np.floating]) -> float:
    """The length of a line through points, each edge in pixels along its longer axis."""
    return float(np.abs(np.diff(points.astype(np.float64), axis=0)).max(axis=1, initial=0).sum())


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MOST_PIXELS


def place_fault(value: Any, size: tuple[int, int]) -> str:
    """How a valid `segmentation` contradicts the height and width of its image; empty if it does not."""
    if isinstance(value, dict):
        return rle_size_fault(tuple(value["size"]), size)
    points = np.concatenate([np.array(polygon, np.float32).reshape(-1, 2) for polygon in value])
    return far_fault([*points.min(axis=0).tolist(), *points.max(axis=0).tolist()], size)


def rle_size_fault(declared: tuple[int, ...], size: tuple[int, int]) -> str:
    """How the height and width of an RLE contradict those of its image; empty if they do not."""
    if declared == size:
        return ""
    return "segmentation is an RLE of {} x {} pixels (height x width), the image has {} x {}".format(*declared, *size)


def far_fault(bounds: Sequence[float], size: tuple[int, int]) -> str:
    """Why polygons with bounds x1, y1, x2, y2 cannot belong to an image of this height and width; empty if they can.

    Labelling tools draw a little beyond an image; more than the image's own size beyond it is a fault.
    """
    (x1, y1, x2, y2), (height, width) = bounds, size
    if x1 >= -width and y1 >= -height and x2 <= 2 * width and y2 <= 2 * height:
        return ""
    spread = f"from {x1:.6g}, {y1:.6g} to {x2:.6g}, {y2:.6g}"
    return f"segmentation has a polygon {spread}, more than the size of the {width} x {height} image outside of it"


def parse(file: Path, content: bytes) -> Segmentations:
    """The segmentations in the bytes of a file whose other columns are valid. Raises InputError for the first fault."""
    rows = outline_rows(content)
    parts = []
    for start in range(0, max(len(rows), 1), _AT_ONCE):
        own = rows[start : start + _AT_ONCE]
        parts.append(_columns(_values(file, own)))
        if _length(parts[-1]["vertices"]) > _LONGEST_OUTLINE:
            _checked(file, own)  # finds whether one object's outline is too long
    columns: Columns = {}
    for name in list(parts[0]):
        column = np.concatenate([part.pop(name) for part in parts])
        is_length = name.endswith(".counts")
        columns[name.replace(".counts", ".ends")] = column.cumsum() if is_length else column
    digest = hashlib.sha256(usedforsecurity=False)
    for name in sorted(columns):
        digest.update(columns[name].data)
    return unpacked({**columns, "digest": text_column(digest.hexdigest())})


class _Rle(msgspec.Struct, gc=False):
    size: list[int]
    counts: str | list[int]


_Polygon = Annotated[list[Number], Meta(min_length=6)]
_Value = list[_Polygon] | _Rle | None


class OutlineRow(msgspec.Struct, gc=False):
    """The segmentation of an annotation, undecoded, with its ids."""

    id: Any = None
    image_id: Any = None
    segmentation: msgspec.Raw = msgspec.Raw(b"null")

    def value(self) -> Any:
        """The decoded segmentation, of any type; a string if it cannot be decoded."""
        try:
            return msgspec.json.decode(self.segmentation)
        except (msgspec.MsgspecError, UnicodeError):
            return bytes(self.segmentation).decode("utf-8", "replace")


class _Rows(msgspec.Struct):
    annotations: list[OutlineRow]


_ROWS, _VALUES = msgspec.json.Decoder(_Rows), msgspec.json.Decoder(list[_Value])


def outline_rows(content: bytes) -> list[OutlineRow]:
    """The annotations in the bytes of a file of the right structure, segmentations undecoded."""
    return _ROWS.decode(content.removeprefix(MARK)).annotations


def _values(file: Path, rows: Sequence[OutlineRow]) -> list[_Value]:
    """The segmentations of some rows, decoded together. Raises InputError for the first fault."""
    with suppress(msgspec.MsgspecError, UnicodeError):
        values = _VALUES.decode(b"[" + b",".join(row.segmentation for row in rows) + b"]")
        if all(_is_sound(value) for value in values):
            return values
    return _checked(file, rows)


def _checked(file: Path, rows: Sequence[OutlineRow]) -> list[_Value]:
    """The segmentations of some rows, decoded and checked one by one. Raises InputError for the first fault."""
    found: list[_Value] = []
    for row in rows:
        value = row.value()
        if fault := segmentation_fault(value):
            raise refusal(file, fault, row.image_id, row.id, verb="data check --masks")
        found.append(_Rle(value["size"], value["counts"]) if isinstance(value, dict) else value)
    return found


def _is_sound(value: _Value) -> bool:
    """Whether a value of the right types has no fault."""
    if isinstance(value, list):
        return not any(len(polygon) % 2 for polygon in value)
    return value is None or not _rle_fault(value.size, value.counts)


def _columns(values: Sequence[_Value]) -> Columns:
    """The columns of some objects, with `.counts` in place of `.ends`."""
    outlines = [value if isinstance(value, list) else [] for value in values]
    polygons = [*chain.from_iterable(outlines)]
    lengths = np.array([len(polygon) for polygon in polygons], np.int64)
    vertices = np.fromiter(chain.from_iterable(polygons), np.float32, int(lengths.sum())).reshape(-1, 2)
    runs = [_runs(value) if isinstance(value, _Rle) else np.zeros(0, np.int32) for value in values]
    sizes = [value.size if isinstance(value, _Rle) else (0, 0) for value in values]
    num_polygons = np.array([len(outline) for outline in outlines], np.int64)
    num_vertices = _sums(lengths // 2, num_polygons.cumsum())
    bounds = np.zeros((len(values), 4), np.float32)
    has_some = num_vertices > 0
    if has_some.any():
        starts = (num_vertices.cumsum() - num_vertices)[has_some]
        bounds[has_some, :2] = np.minimum.reduceat(vertices, starts)
        bounds[has_some, 2:] = np.maximum.reduceat(vertices, starts)
    return {
        "vertices": vertices,
        "vertices.counts": lengths // 2,
        "polygons.counts": num_polygons,
        "bounds": bounds,
        "runs": np.concatenate([np.zeros(0, np.int32), *runs]),
        "runs.counts": np.array([len(own) for own in runs], np.int64),
        "rle_sizes": np.array(sizes, np.int32).reshape(-1, 2),
    }


def _runs(rle: _Rle) -> NDArray[np.int32]:
    runs = runs_of_text(rle.counts) if isinstance(rle.counts, str) else rle.counts
    return np.array(runs, np.int32)


def _sums(values: NDArray[Any], ends: NDArray[np.int64]) -> NDArray[Any]:
    """The sum of each row of a list of rows that end at these places."""
    sums = np.concatenate([[0], values.cumsum()])
    return np.diff(sums[ends], prepend=0)
