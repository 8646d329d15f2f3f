"""The run folder: everything that a run leaves behind, and how its files are written.

A run folder holds (docs/run_folder.md describes each format)

    recipe.yaml        the complete recipe, as text: `megdet train runs/a/recipe.yaml` repeats the run
    environment.json   where it ran, one entry a start               (environment.py)
    metrics.jsonl      the numbers of every step and evaluation      (metrics.py)
    ledger.jsonl       digests of all that it computed, a chain  (ledger.py)
    image_digests.json  SHA-256 of every training image's file
    replaced_images.json  training images that could not be read, if there were any
    trackers.json      how much was sent to each tracker, if the recipe names any
    evaluation.json    the COCO numbers of the last evaluation
    detections.json    the detections they were counted from, in the COCO result format
    checkpoints/       what a resume needs                           (checkpoint_files.py)
    pictures/          curves and images with detections
    report.html        one page about the whole run

Every file but `metrics.jsonl` and `ledger.jsonl`, which grow line by line, is written to a temporary file beside it,
flushed to the disk and renamed, so a reader sees the old content or the new one, never a part. JSON is UTF-8 and
strict: no NaN, no Infinity. Where such a number may occur (metrics, the state of a checkpoint), it is one of the
strings "NaN", "Infinity" and "-Infinity", which Python's `float()` and JavaScript's `Number()` both understand.
"""

import errno
import importlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from megdet.errors import InputError
from megdet.files import cannot_write, read_text, reason_of, temporary_name, write_text_atomically

# Windows has no such locks; two starts in one folder are not noticed there
_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunFolder:
    """The paths of one run folder. Making the object touches nothing on the disk; `create` does."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.ledger = self.path / "ledger.jsonl"
        self.image_digests = self.path / "image_digests.json"
        self.evaluation = self.path / "evaluation.json"
        self.detections = self.path / "detections.json"
        self.trackers = self.path / "trackers.json"
        self.report = self.path / "report.html"
        self.replaced_images = self.path / "replaced_images.json"
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def create(self) -> "RunFolder":
        """Make the folder and its subfolders if they are missing, and check that they can be written.

        Raises:
            InputError: the path, or one above it, is a file, or the folder cannot be written.
        """
        for folder in (self.path, self.checkpoints, self.pictures):
            probe = folder / temporary_name("probe")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe.touch()  # permission bits are not enough: a disk may be full or mounted read-only
                probe.unlink()
            except OSError as error:
                raise InputError(
                    f"the run folder {self.path} cannot be written: {reason_of(error)}; choose another with --run"
                ) from error
        return self

    def lock(self, name: str = ".lock") -> "FolderLock":
        """Lock the folder against other processes until the returned lock is closed or this process ends.

        Args:
            name: of the lock. A sweep takes one of its own, beside that of the training.

        Raises:
            LockedError: another process has locked it.
        """
        path = self.checkpoints / name
        file = path.open("w")
        lock = FolderLock(self, path, file)
        if _fcntl is None:
            return lock
        try:
            _fcntl.flock(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise LockedError(
                f"{self.path}: another process trains in this folder; wait for it, or choose another with --run"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network file systems have no locks
                raise cannot_write(self.path, error) from error
        return lock

    def write_recipe(self, text: str) -> None:
        """Write the complete recipe of this run, as YAML. Raises InputError if it cannot be written."""
        write_text_atomically(self.recipe, text)

    def read_recipe(self) -> str | None:
        """The text of the recipe, or None if the folder has none yet.

        Raises:
            InputError: the file exists and cannot be read as UTF-8 text.
        """
        return read_text(self.recipe) if self.recipe.exists() else None


class LockedError(InputError):
    """Another process has locked the folder."""


class FolderLock:
    """A run folder that this process has locked."""

    def __init__(self, folder: RunFolder, path: Path, file: TextIO) -> None:
        self.folder, self._path, self._file = folder, path, file

    def check(self) -> None:
        """Raise InputError if the folder was moved, deleted or made read-only: new results would be lost."""
        try:
            is_there = os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except OSError:
            is_there = False
        if not is_there:
            raise InputError(
                f"the run folder {self.folder.path} was moved or deleted while the run went on: put it back and run "
                "the same command again"
            )
        if not os.access(self.folder.checkpoints, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise InputError(
                f"the run folder {self.folder.path} was made read-only while the run went on: let this user write "
                "there and run the same command again"
            )

    def close(self) -> None:
        """Unlock the folder."""
        self._file.close()


def encode_non_finite(value: Any) -> Any:
    """A copy of the value for strict JSON: NaN and infinities as strings, numpy scalars as Python numbers."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: encode_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode_non_finite(item) for item in value]
    return value


def decode_non_finite(value: Any) -> Any:
    """The reverse of `encode_non_finite`: the strings "NaN", "Infinity" and "-Infinity" become floats again."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode_non_finite(item) for item in value]
    return value


def not_a_run(folder: RunFolder) -> InputError:
    """The error for a path that is no run folder; a file of a run is answered with its folder."""
    run = next((own for own in folder.path.parents if (own / "recipe.yaml").is_file()), None)
    hint = f"; did you mean {run}?" if run is not None else ""
    return InputError(f"{folder.path}: not a run folder, it has no recipe.yaml{hint}")
