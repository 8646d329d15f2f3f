"""A run as its files tell of it, while another process trains: recipe.yaml, environment.json, metrics.jsonl."""

import time
from pathlib import Path
from typing import Any

import msgspec

from megdet.errors import InputError
from megdet.files import parse_json, read_text, typed
from megdet.recipe_file import parse_recipe
from megdet.run_folder.folder import RunFolder, decode_non_finite
from megdet.run_folder.sessions import read_environment
from megdet.screen.standing import Standing, duration

_QUIET_SECONDS = 60.0
_QUIET_STEPS = 20
"""A run that writes nothing for a minute, and for the time of so many steps and three evaluations, seems to be dead."""


class _Step(msgspec.Struct):
    """What every record of a step has."""

    step: int
    epoch: float
    learning_rate: float
    loss: float
    gradient_norm: float
    seconds: float
    data_seconds: float


class _Numbers(msgspec.Struct):
    AP: float
    AP50: float


class _Evaluation(msgspec.Struct):
    """What every record of an evaluation has."""

    step: int
    evaluation: dict[str, _Numbers]
    seconds: float = 0.0


class _Training(msgspec.Struct):
    """What a start of a training says of it (`training.resume.facts_of_training`)."""

    num_images: int
    last_step: int
    positive_out_of: dict[str, float]


class _Session(msgspec.Struct):
    """The part of an entry of environment.json that is looked at."""

    world_size: int
    device: str
    training: _Training


class WatchedRun:
    """A run folder that is read again and again; `look` reads what is new.

    Args:
        path: the run folder, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.standing: Standing | None = None
        """None as long as there is no run"""
        self._lines = _Lines(self.folder.metrics)
        self._evaluation_seconds = 0.0
        self._facts: Any = None

    def look(self) -> bool:
        """Read what is new; returns whether anything was. Raises InputError for files that are not those of a run."""
        if not self.folder.environment.is_file() or not self.folder.recipe.is_file():
            self.standing = None
            return False
        session = read_environment(self.folder)[-1:]
        facts = session[0] if session else {}
        records, is_new_file = self._lines.read()
        is_new = bool(records) or facts != self._facts
        if self.standing is None or is_new_file or facts != self._facts:
            # another start, which forgets steps and may be on other devices
            records = self._lines.all()
            self.standing, self._facts = _standing(self.folder, facts), facts
        for record in records:
            if "evaluation" in record:
                self._evaluation_seconds = record.get("seconds", 0.0)
            self.standing.add(record)
        return is_new

    def state(self) -> str:
        """What goes on, in a few words: where the run is not there, done, quiet for long, or nothing of that ("")."""
        if self.standing is None:
            return f"no run in {self.folder.path} yet"
        if self.standing.is_done:
            return "done: every step is made and evaluated"
        quiet = self.quiet_seconds()
        step = self.standing.seconds_a_step or 0.0
        if quiet < max(_QUIET_SECONDS, _QUIET_STEPS * step, 3 * self._evaluation_seconds):
            return ""
        return f"nothing new for {duration(quiet)}: it seems to be dead; the same command goes on from its checkpoint"

    def quiet_seconds(self) -> float:
        """How long ago a file of the run was written."""
        files = [file for file in (self.folder.metrics, self.folder.environment) if file.exists()]
        return max(0.0, time.time() - max((file.stat().st_mtime for file in files), default=0.0))


class _Lines:
    """The records of a metrics.jsonl that grows, and is written anew by another start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[int, int] = (0, 0)
        """inode, and the bytes of whole lines that have been read"""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The records since the last call, and whether the file is another one than then."""
        try:
            with self.path.open("rb") as file:
                found = file.seek(0, 2)
                inode = self.path.stat().st_ino
                is_other = inode != self._known[0] or found < self._known[1]
                start = 0 if is_other else self._known[1]
                file.seek(start)
                content = file.read()
        except FileNotFoundError:
            return [], False  # before the first step
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}") from error
        whole = content[: content.rfind(b"\n") + 1]
        self._known = inode, start + len(whole)
        return [self._record(line) for line in whole.splitlines() if line.strip()], is_other

    def all(self) -> list[dict[str, Any]]:
        """All records."""
        self._known = (0, 0)
        return self.read()[0]

    def _record(self, line: bytes) -> dict[str, Any]:
        record = decode_non_finite(parse_json(line, str(self.path)))
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise InputError(f"{self.path}: a line is no JSON object with an integer 'step'; remove that line")
        if "loss" in record:
            typed(record, _Step, str(self.path))
        elif "evaluation" in record:
            typed(record, _Evaluation, str(self.path))
        return record


def _standing(folder: RunFolder, session: dict[str, Any]) -> Standing:
    if "training" not in session:
        raise InputError(
            f"{folder.environment}: its last start tells of no training: the weights were imported, or an earlier "
            "megdet trained them"
        )
    own = typed(session, _Session, str(folder.environment))
    recipe = parse_recipe(read_text(folder.recipe), str(folder.recipe))
    place = f"{own.world_size} x {own.device.partition(':')[0]}, {recipe.precision}"
    facts = own.training
    return Standing(
        str(folder.path), place, recipe.batch_size, facts.num_images, facts.last_step, facts.positive_out_of
    )
