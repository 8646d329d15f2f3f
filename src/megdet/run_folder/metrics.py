"""metrics.jsonl: the numbers of a run over time, one JSON object a line, in the order they were written.

Every line has the integer key "step": the number of optimizer steps done when it was written. The other keys are the
caller's and differ from line to line (a training line has losses, an evaluation line has scores). A number
that is not finite is the string "NaN", "Infinity" or "-Infinity"; `read_metrics` makes floats of them again.

Each line is flushed as it is written, so the file can be followed with `tail -f`. A run that is killed may leave half a
line at the end: readers skip it, and the next start removes it.
"""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from megdet.errors import InputError
from megdet.files import LARGEST_JSON, cannot_write, parse_json, read_bytes, write_text_atomically
from megdet.run_folder.folder import decode_non_finite, encode_non_finite


class MetricsWriter:
    """Appends lines to metrics.jsonl; only rank 0 of a run has a writer.

    Args:
        path: the file; it is made if it is missing.
        resume_step: the step of the checkpoint that the run goes on from, 0 for a start from the beginning. Lines of
            later steps, and half a line at the end, are removed: those steps are made and written again.
        unevaluated: steps that no checkpoint knows as evaluated. The line of such an evaluation, written just before
            the run was killed, is removed: the step is evaluated again.
        roll_backs: those that the checkpoint knows of. The line of a later one, written just before the run was killed,
            is removed: the run diverges again.

    Raises:
        InputError: the file cannot be written, or a line (not the last) is not a JSON object with a "step".
    """

    def __init__(
        self, path: Path, resume_step: int = 0, unevaluated: Collection[int] = (), roll_backs: int | None = None
    ) -> None:
        self.path = path
        if path.exists():
            content = read_bytes(path, LARGEST_JSON)
            kept, backs = list[str](), 0
            for line, record in _parse(path, content):
                backs += "rolled_back" in record
                is_again = "evaluation" in record and record["step"] in unevaluated
                is_again |= "rolled_back" in record and roll_backs is not None and backs > roll_backs
                if record["step"] <= resume_step and not is_again:
                    kept.append(line)
            text = "".join(line + "\n" for line in kept)
            if text.encode() != content:
                write_text_atomically(path, text)
        try:
            self._file = path.open("ab", buffering=0)  # no buffer: one that a full disk refused is written again
        except OSError as error:
            raise cannot_write(path, error) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line: "step" (int) and the caller's keys, with Python or numpy numbers, strings, lists, dicts.

        Raises:
            ValueError: "step" is missing or not an integer, which is a bug of the caller.
            InputError: the disk is full.
        """
        if type(record.get("step")) is not int:
            raise ValueError(f"a metrics record needs an integer 'step', this one has {record.get('step')!r}")
        line = json.dumps(encode_non_finite(record), allow_nan=False)
        rest = memoryview((line + "\n").encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def sync(self) -> None:
        """Flush the lines so far to the disk; does nothing after `close`. Raises InputError."""
        try:
            if not self._file.closed:
                os.fsync(self._file.fileno())
        except ValueError:
            return  # it was closed by another thread meanwhile
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Flush the file to the disk and close it; a second call does nothing. Raises InputError: the disk is full."""
        if self._file.closed:
            return
        try:
            with self._file:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except InputError:
            if kind is None:
                raise  # otherwise the error that stopped the run is more important


class Score(NamedTuple):
    """An evaluation of boxes."""

    step: int
    epoch: float
    mmap: float
    """percent"""


def scores_of(lines: Sequence[Mapping[str, Any]]) -> list[Score]:
    """The evaluations of a run whose boxes have a score, by the lines of its metrics."""
    epochs = {line["step"]: float(line["epoch"]) for line in lines if "loss" in line}
    return [
        Score(line["step"], epochs[line["step"]], 100 * float(line["evaluation"]["bbox"]["AP"]))
        for line in lines
        if "evaluation" in line and line["step"] in epochs and line["evaluation"]["bbox"]["AP"] >= 0
    ]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, oldest first; half a line at the end is left out.

    Raises:
        InputError: the file is missing or unreadable, or a line (not the last) is not a JSON object with a "step".
    """
    return [record for _, record in _parse(path, read_bytes(path, LARGEST_JSON))]


def _parse(path: Path, content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Every whole line with its record."""
    lines = content.split(b"\n")
    last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
    parsed: list[tuple[str, dict[str, Any]]] = []
    for index, raw in enumerate(lines[: last + 1]):
        try:
            record = decode_non_finite(parse_json(raw, str(path)))
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise InputError("no integer 'step'")
        except InputError as error:
            if index == last:
                break  # the run was killed while it wrote this line
            raise InputError(
                f"{path} line {index + 1} is not a JSON object with an integer 'step'; remove that line"
            ) from error
        parsed.append((raw.decode(), record))
    return parsed
