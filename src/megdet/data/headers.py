"""The sizes of many images, read from their headers once and remembered in the user's cache folder."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megdet.data.image import Header, read_header
from megdet.errors import InputError
from megdet.files import replace_file

_THREADS = 16  # disks and network folders answer many questions at once

_Remembered = dict[str, list[int]]  # file name: time of change in ns, bytes, height, width, is_swapped


def read_headers(annotations_file: Path, image_folder: Path, file_names: Sequence[str]) -> list[Header]:
    """The header of each image, as `read_header` gives it.

    A header is read again where the file's time or length differ from the cache's. A cache that is damaged or cannot
    be written only costs time.

    Raises:
        InputError: files are missing (says how many), or one is no image.
    """
    cache_file = _cache_file(annotations_file, image_folder)
    remembered = _read_cache(cache_file)
    with ThreadPoolExecutor(_THREADS) as pool:
        stamps = list(pool.map(lambda name: _stamp(image_folder / name), file_names))
        missing = [name for name, stamp in zip(file_names, stamps, strict=True) if stamp is None]
        if missing:
            raise InputError(
                f"{image_folder}: {len(missing)} of {len(file_names)} images of {annotations_file} are missing, "
                f"the first is {missing[0]!r}; wrong image folder?"
            )
        entries = {name: list(stamp) for name, stamp in zip(file_names, stamps, strict=True) if stamp is not None}
        new = [name for name, stamp in entries.items() if remembered.get(name, [])[:2] != stamp]
        for name, header in zip(new, pool.map(lambda name: read_header(image_folder / name), new), strict=True):
            remembered[name] = [*entries[name], *(int(value) for value in header)]
    if new:
        _write_cache(cache_file, remembered)
    return [Header(height, width, bool(swap)) for _, _, height, width, swap in map(remembered.__getitem__, file_names)]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # a name with a zero byte is a ValueError
        return None
    return status.st_mtime_ns, status.st_size


def _cache_file(annotations_file: Path, image_folder: Path) -> Path:
    key = f"{image_folder.resolve()}\n{annotations_file.resolve()}"
    name = f"headers-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.json"
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "megdet" / name
    try:
        return Path.home() / ".cache" / "megdet" / name
    except RuntimeError:  # a user without a home has no cache either
        return Path(os.devnull) / name


def _read_cache(file: Path) -> _Remembered:
    try:
        cache = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(cache, dict):
        return {}
    return {name: row for name, row in cache.items() if isinstance(row, list) and len(row) == 5}


def _write_cache(file: Path, remembered: _Remembered) -> bool:
    """Whether the cache could be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(remembered).encode(), durable=False)
    except (OSError, ValueError):
        return False
    return True
