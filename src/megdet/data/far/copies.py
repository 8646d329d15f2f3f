"""Copies of files on a local disk, limited in size; those that were not used for longest leave first.

Any number of processes may share the folder. A copy is written under another name and renamed, so no reader sees half
of one, and it carries its length and a checksum, so what a crash left behind is found out. The bytes of all copies are
counted in a file that is changed under a lock before a copy gets its name: a process killed in between makes the
count too large, never too small, and the next look at the folder puts it right. Copies that are just being written come
on top, one a thread.
"""

import hashlib
import os
import struct
import threading
import zlib
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from megdet.files import delete_leftovers, reason_of, temporary_name

_MAGIC = b"MegDetF1"
_HEADER = struct.Struct("<8sQI4x")
"""magic, bytes of the file, checksum: 24 bytes"""
_COUNT = struct.Struct("<Q")
_LEFT_AFTER_EVICTION = 0.9
"""Part of the limit that copies may have after some were deleted, so that this is not due again at once."""
_LONGEST_LOCK = 10.0
"""Seconds that a process waits for the lock; then the file is not kept this time."""
_LOOK_AGAIN = 0.002
"""Seconds between two looks at a lock that another process holds."""


class FileCopies:
    """The copies in one folder, `most_bytes` of them at most."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._is_written = most_bytes > 0
        self._notices: list[str] = []
        self._in_turn = threading.Lock()  # threads that wait here do not poll
        if self._is_written:
            delete_leftovers(folder)

    def read(self, key: str) -> bytes | None:
        """The content kept under a key, which counts as used now; None if there is none, or if it is damaged."""
        file = self._file(key)
        try:
            kept = file.read_bytes()
            os.utime(file)
        except OSError:  # it is not there, or was deleted just now
            return None
        if len(kept) >= _HEADER.size:
            magic, size, checksum = _HEADER.unpack_from(kept)
            content = kept[_HEADER.size :]
            if magic == _MAGIC and len(content) == size and zlib.crc32(content) == checksum:
                return content
        self.forget(key)
        self._notices.append(f"{file}: this copy of a far image is damaged and is fetched again; is the disk sound?")
        return None

    def write(self, key: str, content: bytes) -> None:
        """Keep a content; a folder that cannot be written is noticed once, and nothing is kept from then on."""
        file, size = self._file(key), _HEADER.size + len(content)
        if not self._is_written or size > self.most_bytes * _LEFT_AFTER_EVICTION or file.exists():
            return
        temporary = self.folder / temporary_name(f"{file.name}.{threading.get_ident()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(_HEADER.pack(_MAGIC, len(content), zlib.crc32(content)) + content)
            self._put(temporary, file, size)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            if isinstance(error, Timeout):  # of the lock
                return
            self._is_written = False
            self._notices.append(
                f"{self.folder}: no more copies of far images can be kept ({reason_of(error)}); the run goes on "
                "without them; free space or lower data.far_cache_gib"
            )

    def forget(self, key: str) -> None:
        """Delete a copy."""
        with suppress(OSError):
            self._file(key).unlink(missing_ok=True)

    def take_notices(self) -> list[str]:
        """Messages for the user since the last call, a line each."""
        taken, self._notices = self._notices, []
        return taken

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(os.fsencode(key)).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.copy"

    def _put(self, temporary: Path, file: Path, size: int) -> None:
        """Give a written copy its name, after deleting the oldest ones if they would be too many. Raises OSError.

        Both under one lock: bytes that are counted and not yet there would be forgotten when another process counts.
        """
        lock = FileLock(self.folder / "lock")
        with self._in_turn, lock.acquire(timeout=_LONGEST_LOCK, poll_interval=_LOOK_AGAIN):
            count = self.folder / "bytes"
            try:
                (total,) = _COUNT.unpack(count.read_bytes())
            except (OSError, struct.error):  # it is the first copy, or a crash cut the file short
                total = self._evicted(self.most_bytes)
            if total + size > self.most_bytes:
                total = self._evicted(max(0, int(self.most_bytes * _LEFT_AFTER_EVICTION) - size))
            count.write_bytes(_COUNT.pack(total + size))
            temporary.replace(file)

    def _evicted(self, most: int) -> int:
        """Delete the copies used longest ago until at most `most` bytes are left; returns the bytes that are."""
        found: list[tuple[int, int, str]] = []
        for folder in self.folder.glob("??"):
            with os.scandir(folder) as inside:
                for entry in inside:
                    with suppress(OSError):  # deleted by `forget` meanwhile
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= most:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total
