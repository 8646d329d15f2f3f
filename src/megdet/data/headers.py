"""The sizes of many images, read from their headers once and kept in the user's cache folder."""

import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megdet.data.columns import Columns, text_column, text_of
from megdet.data.far.folder import FarFile, FarFolder, ImageFile, ImageFolder, Stamp, file_in
from megdet.data.image import Header, kind_fault, whole_header
from megdet.data.user_cache import cache_file, recall, remember
from megdet.errors import InputError, shown

FORMAT = "1"
"""Version of the cached columns: name, time of change in ns, bytes; height, width, is_swapped."""

_THREADS = 16  # disks and network folders answer many questions at once
_NEVER = -1
"""The stamp of a lost file: no file has it, so it is read once it exists."""
_AT_ONCE = 512
"""Files that one task of a thread looks at."""


class StampedHeaders(NamedTuple):
    """What is known of the images of a data set without decoding them."""

    headers: NDArray[np.int64]
    """(files, 3): height, width and is_swapped, as `whole_header` gives them"""
    stamps: NDArray[np.int64]
    """(files, 2): the columns of `Stamp`"""


class Lost(NamedTuple):
    """How many files may be lost, and which sizes are then assumed."""

    sizes: NDArray[np.float64]
    """(files, 2): height and width assumed for files that were never read, NaN if not known"""
    most: int
    """files that may be lost"""


def read_headers(annotations_file: Path, image_folder: ImageFolder, file_names: Sequence[str]) -> NDArray[np.int64]:
    """The headers of `read_stamped_headers`; no file may be lost."""
    return read_stamped_headers(annotations_file, image_folder, file_names).headers


def read_stamped_headers(
    annotations_file: Path, image_folder: ImageFolder, file_names: Sequence[str], lost: Lost | None = None
) -> StampedHeaders:
    """Height, width and is_swapped of each image, as `whole_header` gives them, and the stamps of the files.

    A header is read again if the file's stamp differs from the cache. A damaged or unwritable cache only costs time.
    With `lost`, a missing or damaged file gets its cached header, or the size in `lost`. Of far files the first bytes
    are fetched, and what was read is kept also if the reading is interrupted.

    Raises:
        InputError: files are missing (the message counts them), or a file is not an image or is truncated.
    """
    known = _Known(annotations_file, image_folder, file_names)
    with ThreadPoolExecutor(_THREADS) as pool:
        stamps = _stamps(pool, annotations_file, image_folder, file_names, 0 if lost is None else lost.most)
    headers, new = known.headers_of(stamps)
    if not new:
        return StampedHeaders(headers, stamps)
    files = (file_in(image_folder, file_names[index], Stamp(*stamps[index].tolist())) for index in new)
    unread: list[int] = []
    reading = _read(image_folder, files, len(new))
    try:
        for index, found in zip(new, reading, strict=True):
            if not isinstance(found, InputError):
                headers[index] = found
                continue
            unread.append(index)
            if known.places[index] >= 0 and lost is not None:
                place = known.places[index]
                headers[index], stamps[index] = known.old_headers[place], known.old_stamps[place]
            elif lost is not None and not np.isnan(lost.sizes[index]).any():
                headers[index] = *lost.sizes[index], 0
                stamps[index] = _NEVER
            if len(unread) > (0 if lost is None else lost.most) or not headers[index].any():
                also = "" if len(unread) == 1 else f"{len(unread)} files cannot be read, more than data.most_replaced: "
                raise InputError(
                    f"{also}{found}, or take the image out of {annotations_file}: a run that has begun "
                    "then goes on in a new folder with start_from, since the data set is another"
                )
    except BaseException:
        reading.close()
        if isinstance(image_folder, FarFolder):
            known.remember(headers, stamps, headers[:, 0] > 0)
        raise
    known.remember(headers, stamps)
    return StampedHeaders(headers, stamps)


class _Known:
    """The headers in the cache file of a data set, and their places among the files that are asked for."""

    def __init__(self, annotations_file: Path, image_folder: ImageFolder, file_names: Sequence[str]) -> None:
        self.file_names = file_names
        self.cache = cache_file("headers", image_folder, annotations_file)
        old = recall(self.cache, format=FORMAT)
        self.old_names = [] if old is None else text_of(old["names"])
        self.old_stamps, self.old_headers = np.zeros((0, 2), np.int64), np.zeros((0, 3), np.int64)
        if old is not None:
            self.old_stamps, self.old_headers = old["stamps"], old["headers"]
        self.place_of = {name: place for place, name in enumerate(self.old_names)}
        self.places = np.array([self.place_of.get(name, -1) for name in file_names], np.int64)

    def headers_of(self, stamps: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
        """(files, 3): the cached headers of files with these stamps, else zeros; and the indices of the others."""
        is_known = self.places >= 0
        is_known[is_known] = (self.old_stamps[self.places[is_known]] == stamps[is_known]).all(axis=1)
        headers = np.zeros((len(self.file_names), 3), np.int64)
        headers[is_known] = self.old_headers[self.places[is_known]]
        return headers, np.flatnonzero(~is_known).tolist()

    def remember(
        self, headers: NDArray[np.int64], stamps: NDArray[np.int64], is_read: NDArray[np.bool_] | None = None
    ) -> None:
        """Write the cache file: these headers, or those of them that were read, and all other old ones."""
        rows = np.arange(len(self.file_names)) if is_read is None else np.flatnonzero(is_read)
        names = [self.file_names[row] for row in rows.tolist()]
        asked = {*names}
        kept = [place for name, place in self.place_of.items() if name not in asked]
        columns: Columns = {
            "names": text_column([*names, *(self.old_names[place] for place in kept)]),
            "stamps": np.concatenate([stamps[rows], self.old_stamps[kept]]),
            "headers": np.concatenate([headers[rows], self.old_headers[kept]]),
        }
        remember(self.cache, columns, format=FORMAT)


def _read(image_folder: ImageFolder, files: Iterator[ImageFile], count: int) -> Generator[Header | InputError]:
    """The headers of files, several read at once."""
    threads, progress = _THREADS, None
    if isinstance(image_folder, FarFolder):
        from megdet.data.far.headers import THREADS, Progress  # here, because it imports fsspec
        from megdet.data.far.reading import give_up

        threads, progress = THREADS, Progress(image_folder, count)
    pool = ThreadPoolExecutor(threads)
    try:
        for found in pool.map(_header_of, files):
            if progress is not None:
                progress.one_more()
            yield found
    except BaseException:
        if isinstance(image_folder, FarFolder):
            give_up(image_folder)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _header_of(file: ImageFile) -> Header | InputError:
    try:
        if not isinstance(file, FarFile):
            return whole_header(file)
        from megdet.data.far.headers import far_header

        return far_header(file)
    except InputError as error:
        return error


def _stamps(
    pool: ThreadPoolExecutor,
    annotations_file: Path,
    image_folder: ImageFolder,
    file_names: Sequence[str],
    most_missing: int,
) -> NDArray[np.int64]:
    """(files, 2): time of change in ns and bytes of each file.

    Raises InputError if a name is not a file, or if more than `most_missing` files are missing.
    """

    def look(start: int) -> list[tuple[int, int, int]]:
        return [_stamp(os.path.join(folder, name)) for name in file_names[start : start + _AT_ONCE]]  # noqa: PTH118

    folder = str(image_folder)
    if isinstance(image_folder, Path):
        found = np.array([*chain(*pool.map(look, range(0, len(file_names), _AT_ONCE)))], np.int64).reshape(-1, 3)
    else:
        from megdet.data.far.listing import far_stamps  # here, because it imports fsspec

        found = far_stamps(image_folder, file_names)
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
