"""Files of named arrays, in the layout of safetensors: read whole, or mapped so that processes share the memory.

A list of rows of different lengths is two arrays: `name` has all values, `name.ends` the end index of each row.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from megdet.files import replace_file

_TYPES = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}
_LENGTH = 8
"""Bytes of the number at the start of a file, which is the length of its header."""

Columns = dict[str, NDArray[Any]]


def write_columns(path: Path, columns: Columns, notes: Mapping[str, str]) -> None:
    """Write arrays and some text as one file; an older file is replaced as a whole. Raises OSError."""
    flat = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    replace_file(path, save(flat, {**notes, "checksum": _checksum(flat)}), durable=False)


def read_columns(path: Path, *, is_mapped: bool = False) -> tuple[Columns, dict[str, str]]:
    """The arrays and the text of a file, read or mapped. Raises OSError, or ValueError for a damaged file."""
    columns, notes = map_columns(path) if is_mapped else _split(np.fromfile(path, np.uint8))
    if notes.get("checksum") != _checksum(columns):
        raise ValueError("the checksum is wrong")
    return columns, notes


def map_columns(path: Path) -> tuple[Columns, dict[str, str]]:
    """The arrays and the text of a file, mapped without a checksum: pages load on first use, once for all processes."""
    return _split(np.memmap(path, np.uint8, "r").view(np.ndarray))


def text_column(values: object) -> NDArray[np.uint8]:
    """A JSON value as an array of bytes."""
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


def text_of(column: NDArray[np.uint8]) -> Any:
    """The JSON value in a `text_column`."""
    return json.loads(column.tobytes())


def id_array(ids: Sequence[int | str]) -> NDArray[Any]:
    """Ids as int64, or as objects if one is a string or does not fit."""
    are_short = all(type(value) is int and -(1 << 63) <= value < 1 << 63 for value in ids)
    array: NDArray[Any] = np.empty(len(ids), np.int64 if are_short else object)
    array[:] = ids
    return array


def id_column(ids: NDArray[Any]) -> NDArray[Any]:
    """The ids of an `id_array` in a form that a file can hold."""
    return text_column(ids.tolist()) if ids.dtype == object else ids


def ids_of(column: NDArray[Any]) -> NDArray[Any]:
    """The `id_array` of an `id_column`."""
    return id_array(text_of(column)) if column.dtype == np.uint8 else column


def _split(content: NDArray[np.uint8]) -> tuple[Columns, dict[str, str]]:
    start = _LENGTH + int.from_bytes(content[:_LENGTH].tobytes(), "little")
    try:
        header = json.loads(content[_LENGTH:start].tobytes())
        notes = header.pop("__metadata__")
        columns = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            columns[name] = content[start + first : start + last].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this is no file of columns: {error}") from error
    return columns, notes


def _checksum(columns: Columns) -> str:
    checksum = 0
    for name in sorted(columns):
        checksum = zlib.crc32(columns[name].reshape(-1).view(np.uint8).data, zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"
