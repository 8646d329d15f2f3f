"""The run folder: where everything is that a run leaves behind, and how its files are written.

A run folder holds (docs/run_folder.md describes each format)

    recipe.yaml        the complete recipe, as text: `megdet train runs/a/recipe.yaml` repeats the run
    environment.json   where it ran, one entry a start               (environment.py)
    metrics.jsonl      one line of numbers now and then              (metrics.py)
    evaluation.json    the COCO numbers of the last evaluation
    detections.json    the detections they were counted from, in the COCO result format
    checkpoints/       what a resume needs                           (checkpoint_files.py)
    pictures/          images for the eye

Every file but `metrics.jsonl`, which grows line by line, is written to a temporary file beside it, flushed to the disk
and renamed, so a reader sees the old content or the new one and never a half. JSON is UTF-8 and strict: no NaN, no
Infinity. Where such a number may occur (metrics, the state of a checkpoint), it is one of the strings "NaN", "Infinity"
and "-Infinity", which Python's `float()` and JavaScript's `Number()` both understand.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megdet.errors import InputError

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunFolder:
    """The paths of one run folder. Making the object touches nothing on the disk; `create` does."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluation = self.path / "evaluation.json"
        self.detections = self.path / "detections.json"
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def create(self) -> "RunFolder":
        """Make the folder and its subfolders where they are missing, and try that they can be written.

        Raises:
            InputError: the path, or one above it, is a file, or the folder cannot be written.
        """
        for folder in (self.path, self.checkpoints, self.pictures):
            probe = folder / f".probe.{os.getpid()}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe.touch()  # permission bits do not tell everything: a disk may be full or mounted read-only
                probe.unlink()
            except OSError as error:
                raise InputError(
                    f"the run folder {self.path} cannot be written: {_reason(error)}; choose another with --run"
                ) from error
        return self

    def write_recipe(self, text: str) -> None:
        """Keep the complete recipe of this run, YAML text. Raises InputError where it cannot be written."""
        write_text_atomically(self.recipe, text)

    def read_recipe(self) -> str | None:
        """The recipe's text as it was written, or None where the folder has none yet.

        Raises:
            InputError: the file is there and cannot be read as UTF-8 text.
        """
        return _read_text(self.recipe) if self.recipe.exists() else None


def write_text_atomically(path: Path, text: str) -> None:
    """Replace the file by this text (UTF-8) as a whole: it survives a crash and a loss of power old or new, never half.

    A lone surrogate (a file name that is not Unicode) becomes its backslash escape, which JSON reads back as it was.

    Raises:
        InputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            # Not tempfile.mkstemp: its files are for the owner only, and os.replace would keep that.
            with temporary.open("wb") as file:
                file.write(text.encode("utf-8", errors="backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105 (tests make this very call fail)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error


def write_json_atomically(path: Path, value: object, indent: int | None = None) -> None:
    """Replace the file by this value as JSON, atomically.

    Args:
        path: the file.
        value: dicts, lists, strings, Python numbers, None; a number that is not finite raises ValueError.
        indent: spaces a level for the eye; None, the default, is one long line, several times faster.

    Raises:
        InputError: the file cannot be written.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_text_atomically(path, text + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file (UTF-8, with or without a byte order mark).

    Raises:
        InputError: the file is missing or unreadable, or it is no JSON; then the message has the line and the column.
    """
    text = _read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = "the file is empty" if not text.strip() else error.msg
        raise InputError(
            f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {found}; "
            "the file may be cut short, write or download it again"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path} is not usable JSON: it is nested too deep; write it again") from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, so that a rename in it survives a loss of power (POSIX)."""
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened; the rename is atomic all the same
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: Exception) -> InputError:
    """The InputError for a file or folder that could not be written."""
    return InputError(
        f"{path} cannot be written: {_reason(error)}; check its folder, its permissions and the free space"
    )


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
    """The reverse of `encode_non_finite`: those three strings become floats again."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode_non_finite(item) for item in value]
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}; check the path and its permissions") from error


def _reason(error: Exception) -> str:
    """The system's words for what went wrong, without the path that the message already has."""
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
