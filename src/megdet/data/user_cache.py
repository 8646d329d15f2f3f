"""The cache folder for what was read of data sets; everything in it may be deleted at any time."""

import hashlib
import os
from pathlib import Path

from megdet.data.columns import Columns, read_columns, write_columns
from megdet.data.far.folder import ImageFolder
from megdet.files import delete_leftovers


def cache_file(kind: str, *paths: ImageFolder) -> Path:
    """The cache file of a kind for these files and folders; it is replaced when they change."""
    key = "\n".join(str(path.resolve()) if isinstance(path, Path) else path.address for path in paths)
    name = f"{kind}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.safetensors"
    return cache_folder() / name


def cache_folder() -> Path:
    """The user's cache folder; for a user without a home, a folder in which nothing can be written."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "megdet"
    try:
        return Path.home() / ".cache" / "megdet"
    except RuntimeError:
        return Path(os.devnull)


def recall(file: Path, *, is_mapped: bool = False, **expected: str) -> Columns | None:
    """The columns of a cache file, read or mapped; None if it is missing, damaged or its notes are not as expected."""
    try:
        columns, notes = read_columns(file, is_mapped=is_mapped)
    except (OSError, ValueError):
        return None
    return columns if notes.items() >= expected.items() else None


def remember(file: Path, columns: Columns, **notes: str) -> bool:
    """Write a cache file; returns whether it could be written. If not, the next start only takes longer."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(file.parent)
        write_columns(file, columns, notes)
    except (OSError, ValueError):
        return False
    return True
