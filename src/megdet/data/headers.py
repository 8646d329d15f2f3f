"""The sizes of many images, read from their headers once and kept in the user's cache folder."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megdet.data.columns import text_column, text_of
from megdet.data.image import Header, kind_fault, whole_header
from megdet.data.user_cache import cache_file, recall, remember
from megdet.errors import InputError, shown

FORMAT = "1"
"""Version of the cached columns: name, time of change in ns, bytes; height, width, is_swapped."""

_THREADS = 16  # disks and network folders answer many questions at once
_AT_ONCE = 512
"""Files that one task of a thread looks at."""


class Lost(NamedTuple):
    """How many files may be lost, and which sizes are then assumed."""

    sizes: NDArray[np.float64]
    """(files, 2): height and width assumed for files that were never read, NaN if not known"""
    most: int
    """files that may be lost"""


def read_headers(
    annotations_file: Path, image_folder: Path, file_names: Sequence[str], lost: Lost | None = None
) -> NDArray[np.int64]:
    """(files, 3): height, width and is_swapped of each image, as `whole_header` gives them.

    A header is read again if the file's time or length differ from the cache. A damaged or unwritable cache only costs
    time. With `lost`, a missing or damaged file gets its cached header, or the size in `lost`.

    Raises:
        InputError: files are missing (the message counts them), or a file is not an image or is truncated.
    """
    cache = cache_file("headers", image_folder, annotations_file)
    old = recall(cache, format=FORMAT)
    old_names = [] if old is None else text_of(old["names"])
    old_stamps, old_headers = (np.zeros((0, 2), np.int64), np.zeros((0, 3), np.int64))
    if old is not None:
        old_stamps, old_headers = old["stamps"], old["headers"]
    with ThreadPoolExecutor(_THREADS) as pool:
        stamps = _stamps(pool, annotations_file, image_folder, file_names, 0 if lost is None else lost.most)
        place_of = {name: place for place, name in enumerate(old_names)}
        places = np.array([place_of.get(name, -1) for name in file_names], np.int64)
        is_known = places >= 0
        is_known[is_known] = (old_stamps[places[is_known]] == stamps[is_known]).all(axis=1)
        headers = np.zeros((len(file_names), 3), np.int64)
        headers[is_known] = old_headers[places[is_known]]
        new = np.flatnonzero(~is_known).tolist()
        unread: list[int] = []
        for index, found in zip(new, pool.map(lambda i: _header_of(image_folder / file_names[i]), new), strict=True):
            if not isinstance(found, InputError):
                headers[index] = found
                continue
            unread.append(index)
            if places[index] >= 0 and lost is not None:
                headers[index], stamps[index] = old_headers[places[index]], old_stamps[places[index]]
            elif lost is not None and not np.isnan(lost.sizes[index]).any():
                headers[index] = *lost.sizes[index], 0
                stamps[index] = -1  # no file has this time, so it is read once it exists
            if len(unread) > (0 if lost is None else lost.most) or not headers[index].any():
                pool.shutdown(cancel_futures=True)
                also = "" if len(unread) == 1 else f"{len(unread)} files cannot be read, more than data.most_replaced: "
                raise InputError(
                    f"{also}{found}, or take the image out of {annotations_file}: a run that has begun "
                    "then goes on in a new folder with start_from, since the data set is another"
                )
    if new:
        asked = set(file_names)
        kept = [place for name, place in place_of.items() if name not in asked]
        columns = {
            "names": text_column([*file_names, *(old_names[place] for place in kept)]),
            "stamps": np.concatenate([stamps, old_stamps[kept]]),
            "headers": np.concatenate([headers, old_headers[kept]]),
        }
        remember(cache, columns, format=FORMAT)
    return headers


def _header_of(path: Path) -> Header | InputError:
    try:
        return whole_header(path)
    except InputError as error:
        return error


def _stamps(
    pool: ThreadPoolExecutor, annotations_file: Path, image_folder: Path, file_names: Sequence[str], most_missing: int
) -> NDArray[np.int64]:
    """(files, 2): time of change in ns and bytes of each file.

    Raises InputError if a name is not a file, or if more than `most_missing` files are missing.
    """

    def look(start: int) -> list[tuple[int, int, int]]:
        return [_stamp(os.path.join(folder, name)) for name in file_names[start : start + _AT_ONCE]]  # noqa: PTH118

    folder = str(image_folder)
    found = np.array([*chain(*pool.map(look, range(0, len(file_names), _AT_ONCE)))], np.int64).reshape(-1, 3)
    missing = np.flatnonzero(found[:, 2] < 0)
    if len(missing) > most_missing:
        raise InputError(
            f"{image_folder}: {len(missing)} of {len(file_names)} images of {annotations_file} are missing, "
            f"the first is {shown(file_names[missing[0]])}; wrong image folder?"
        )
    for index in np.flatnonzero(found[:, 2] > 0).tolist():
        raise InputError(f"{image_folder / file_names[index]}: {kind_fault(int(found[index, 2]))}")
    return found[:, :2]


def _stamp(path: str) -> tuple[int, int, int]:
    """Time, bytes and 0; -1 if the file is missing; the mode if it is not a regular file."""
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path takes longer than the question)
    except (OSError, ValueError):  # a name with a zero byte is a ValueError
        return 0, 0, -1
    return status.st_mtime_ns, status.st_size, status.st_mode if kind_fault(status.st_mode) else 0
