"""Bytes of far files: requests with a time limit, made again where that may help, and copies kept on this machine.

A process opens each folder for itself: the event loop of fsspec does not survive a fork, and a handle of an archive
that two processes share has one position for both. What a parent process had opened is left alone in its children,
since closing it there would close it for the parent too.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fsspec.asyn import sync
from fsspec.core import url_to_fs

from megdet.data.far.copies import FileCopies
from megdet.data.far.faults import CutShortError, lasting_fault, not_missing, passing_fault
from megdet.data.far.folder import FarFile, FarFolder
from megdet.data.far.protocols import in_folder, options_of, protocols_of
from megdet.errors import InputError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 20.0
"""Seconds before a request is made again: the first, doubled each time, at most the second."""
_BUGS = (AssertionError, AttributeError, KeyError, IndexError, NameError, TypeError, MemoryError)
TOGETHER = 16
"""Files of a micro-batch that are fetched at the same time."""

_MOST_BYTES = 1 << 30
"""Of a file that is read into memory; an entry of a zip may be packed a thousandfold."""

_Found = TypeVar("_Found")
_OPENED: dict[tuple[int, FarFolder], "FarReader"] = {}
_LOCKS: dict[int, threading.Lock] = {}


def reader_of(folder: FarFolder) -> "FarReader":
    """This process's reader of a folder, opened at its first use."""
    process = os.getpid()
    with _LOCKS.setdefault(process, threading.Lock()):
        key = process, folder
        if key not in _OPENED:
            _OPENED[key] = FarReader(folder)
        return _OPENED[key]


def content_of(file: FarFile) -> bytes:
    """The bytes of a file. Raises InputError with the reason, without the file's name."""
    return reader_of(file.folder).content(file)


def forget(file: FarFile) -> None:
    """Delete the copy of a file."""
    reader_of(file.folder).forget(file)


def give_up(folder: FarFolder) -> None:
    """Let the threads that read a folder end after the request that each waits for."""
    reader = _OPENED.pop((os.getpid(), folder), None)
    if reader is not None:
        reader.is_given_up.set()


def fetch_ahead(files: Sequence[FarFile]) -> None:
    """Fetch the files of one folder that are read next, several at once; what fails fails when it is read."""
    reader_of(files[0].folder).fetch_ahead(files)


def notices_of(folder: FarFolder) -> list[str]:
    """What the user should know of reading a folder in this process, since the last call."""
    return reader_of(folder).take_notices()


class FarReader:
    """Reads the files of one folder in one process; threads may share it."""

    def __init__(self, folder: FarFolder) -> None:
        self.folder = folder
        self.copies = FileCopies(Path(folder.copies), folder.most_bytes)
        self._opening, self._alone = threading.Lock(), threading.Lock()
        self._filesystem: tuple[Any, str] | None = None
        self.is_given_up = threading.Event()
        self._ahead: dict[FarFile, bytes | InputError] = {}
        self._notices: list[str] = []

    def content(self, file: FarFile) -> bytes:
        """The bytes of a file. Raises InputError with the reason, without the file's name."""
        ahead = self._ahead.pop(file, None)
        if isinstance(ahead, InputError):
            raise ahead
        return self._content(file) if ahead is None else ahead

    def fetch_ahead(self, files: Sequence[FarFile]) -> None:
        """Fetch files that are read next, and keep them in memory until then; earlier ones are given up."""

        def fetch(file: FarFile) -> bytes | InputError:
            try:
                return self._content(file)
            except InputError as error:
                return error

        if self._filesystem is not None and not self._filesystem[0].async_impl:
            return  # they would wait for each other
        own = [*dict.fromkeys(files)]
        with ThreadPoolExecutor(min(TOGETHER, len(own))) as pool:
            self._ahead = dict(zip(own, pool.map(fetch, own), strict=True))

    def beginning(self, file: FarFile, size: int | None) -> bytes:
        """The first `size` bytes of a file, or all of it if its server cannot tell parts. Raises InputError."""
        if size is None:
            return self._content(file)
        content = self._asked(lambda: self._bytes(file, size))
        if len(content) != size:  # shorter or longer: this is all of it
            self._keep(file, content)
        return content

    def listing(self) -> dict[str, Any]:
        """What the server says of each file of the folder and of those below it, by `file_name`. Raises InputError."""

        def ask() -> dict[str, Any]:
            filesystem, root = self._opened()
            begin = in_folder(root, "")
            try:
                with self._alone:
                    found = filesystem.find(root, detail=True)
            except FileNotFoundError:
                return {}
            return {path.removeprefix(begin): info for path, info in found.items()}

        try:
            return self._asked(ask)
        except InputError as error:
            raise InputError(f"{self.folder}: {error}") from None

    def forget(self, file: FarFile) -> None:
        """Delete the copy of a file."""
        self.copies.forget(_key(file))

    def take_notices(self) -> list[str]:
        """What the user should know since the last call, a line each."""
        taken, self._notices = self._notices, []
        return [*taken, *self.copies.take_notices()]

    def _content(self, file: FarFile) -> bytes:
        kept = self.copies.read(_key(file)) if self.folder.most_bytes else None
        if kept is not None:
            return kept
        content = self._asked(lambda: self._bytes(file, None))
        self._keep(file, content)
        return content

    def _keep(self, file: FarFile, content: bytes) -> None:
        if file.stamp.size in (-1, len(content)):
            self.copies.write(_key(file), content)

    def _bytes(self, file: FarFile, size: int | None) -> bytes:
        """One request. Raises whatever the file system raises."""
        if file.stamp.size > _MOST_BYTES:
            raise InputError(
                f"{file.stamp.size} bytes are more than an image has ({_MOST_BYTES}): is it the right file?"
            )
        filesystem, root = self._opened()
        path, part = in_folder(root, file.file_name), {} if size is None else {"start": 0, "end": size}
        if filesystem.async_impl:
            content: bytes = sync(filesystem.loop, filesystem._cat_file, path, **part, timeout=self.folder.timeout)
        else:
            with self._alone:  # an archive is one file with one position
                content = filesystem.cat_file(path, **part)
        whole = file.stamp.size
        if whole not in (-1, len(content)) and (size is None or len(content) != min(size, whole)):
            raise CutShortError(len(content), whole)
        return content

    def _opened(self) -> tuple[Any, str]:
        with self._opening:
            if self._filesystem is None:
                protocols = protocols_of(self.folder.address)
                options = {name: options_of(name, self.folder.timeout) for name in protocols}
                try:
                    self._filesystem = url_to_fs(self.folder.address, **options)
                except FileNotFoundError as error:
                    if passes := not_missing(error):
                        raise passes from None
                    raise InputError("no such archive: check the address") from None
            return self._filesystem

    def _asked(self, ask: Callable[[], _Found]) -> _Found:
        """What `ask` returns, asked again after faults that may pass. Raises InputError."""
        tries = self.folder.retries + 1
        for number in range(tries):
            try:
                return ask()
            except _BUGS:
                raise
            except Exception as error:  # each file system has its own
                if fault := lasting_fault(error):
                    raise InputError(fault) from None
                fault = passing_fault(error, self.folder.timeout)
            if number + 1 < tries:
                notice = f"{self.folder}: {fault}: such requests are made again"
                if notice not in self._notices:
                    self._notices.append(notice)
                if self.is_given_up.wait(_pause(number)):
                    raise InputError("given up")
        times = "" if tries == 1 else f", {tries} times in a row (data.far_retries {self.folder.retries})"
        raise InputError(f"{fault}{times}: is the server up, and is the network?")


def _pause(number: int) -> float:
    """Seconds to wait; processes that failed together do not come back together."""
    spread = 1 + os.getpid() % 16 / 32
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * float(2**number)) * spread


def _key(file: FarFile) -> str:
    return f"{file.stamp.token} {file.stamp.size}\n{file}"
