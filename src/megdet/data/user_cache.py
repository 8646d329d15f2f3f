"""The folder of what is remembered of data sets between runs; everything in it may be deleted at any time."""

import hashlib
import os
from pathlib import Path

from megdet.data.columns import Columns, read_columns, write_columns
from megdet.files import delete_leftovers


def cache_file(kind: str, *paths: Path) -> Path:
    """The file that remembers something of these files and folders: one of each kind, replaced when they change."""
    key = "\n".join(str(path.resolve()) for path in paths)
    name = f"{kind}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.safetensors"
    return cache_folder() / name


def cache_folder() -> Path:
    """The user's folder; a user without a home has none, and nothing can be written there."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "megdet"
    try:
        return Path.home() / ".cache" / "megdet"
    except RuntimeError:
        return Path(os.devnull)


def recall(file: Path, *, is_mapped: bool = False, **expected: str) -> Columns | None:
    """What a file remembers, where it is whole and says of itself what is expected; mapped if asked, not read."""
    try:
        columns, notes = read_columns(file, is_mapped=is_mapped)
    except (OSError, ValueError):
        return None
    return columns if notes.items() >= expected.items() else None


def remember(file: Path, columns: Columns, **notes: str) -> bool:
    """Whether it could be written: without it the next start takes longer, no more."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(file.parent)
        write_columns(file, columns, notes)
    except (OSError, ValueError):
        return False
    return True
