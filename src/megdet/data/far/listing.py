"""What a server says of the files of a folder: which there are, and the stamps by which a changed one is noticed."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet.data.far.folder import UNKNOWN, FarFolder
from megdet.data.far.protocols import is_listed
from megdet.data.far.reading import reader_of
from megdet.errors import InputError

_STAMPS = (
    "ETag",
    "etag",
    "md5Hash",
    "crc32c",
    "content_md5",
    "CRC",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
)
"""What file systems say of a file, of which any may change with it."""


def files_of(folder: FarFolder) -> list[str]:
    """The `file_name` of every file of a folder and of those below it, sorted. Raises InputError."""
    if not is_listed(folder.address):
        raise InputError(f"{folder}: a web server does not say which files it has: name each image")
    listing = reader_of(folder).listing()
    return sorted(name for name, info in listing.items() if info.get("type") != "directory")


def far_stamps(folder: FarFolder, file_names: Sequence[str]) -> NDArray[np.int64]:
    """(files, 3): token and bytes of each file and 0; -1 in the last column if the server does not list it.

    From a web server, which lists nothing, all are `UNKNOWN`. Raises InputError if the listing cannot be had.
    """
    if not is_listed(folder.address):
        return np.tile(np.array([*UNKNOWN, 0], np.int64), (len(file_names), 1))
    listing = reader_of(folder).listing()
    rows = [_row(listing.get(name)) for name in file_names]
    return np.array(rows, np.int64).reshape(-1, 3)


def _row(info: dict[str, Any] | None) -> tuple[int, int, int]:
    if info is None or info.get("type") == "directory":
        return *UNKNOWN, -1
    said = repr([info[key] for key in _STAMPS if info.get(key) is not None])
    size = info.get("size")
    token = int.from_bytes(hashlib.sha256(said.encode()).digest()[:7], "big")
    return token, size if isinstance(size, int) else UNKNOWN.size, 0
