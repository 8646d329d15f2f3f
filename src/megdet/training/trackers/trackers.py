"""The trackers of a run: opened before its first step, fed beside it, opened again by a later start.

RUN/trackers.json says what was sent to each. It is written before sending, so that no step is sent twice; if the run is
killed in between, steps are missing in the tracker. metrics.jsonl has all of them.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from megdet.errors import InputError
from megdet.files import read_json, write_json_atomically
from megdet.recipe import Recipe
from megdet.recipe_check import flat_keys
from megdet.run_folder.folder import RunFolder
from megdet.training.trackers.feed import Feed
from megdet.training.trackers.mlflow import open_mlflow
from megdet.training.trackers.tensorboard import open_tensorboard
from megdet.training.trackers.tracker import Opening, Tracker
from megdet.training.trackers.trackio import open_trackio
from megdet.training.trackers.wandb import open_wandb

_OPENERS: dict[str, Callable[[Opening], Tracker]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "mlflow": open_mlflow,
    "trackio": open_trackio,
}
_SECONDS_BETWEEN_SENDINGS = 10.0
_SECONDS_OF_CLOSING = 60.0


class _Sent(msgspec.Struct):
    """How much of a run was sent to a tracker."""

    identity: str
    steps: int = 0
    """the last step that was sent"""
    evaluated: int = -1
    """the last step whose evaluation was sent"""


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError where the package of a tracker is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"trackers: {name} is not installed: uv pip install 'megdet[{name}]', or leave it out")


class Trackers:
    """All trackers of a recipe, on rank 0; a context manager, which closes them.

    Args:
        recipe: names the trackers, and is sent to each.
        folder: the run folder.
        first_step: steps done when this start began.
        say: prints a sentence.

    Raises:
        InputError: one cannot be opened.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, first_step: int, say: Callable[[str], None]) -> None:
        self._file, self._say = folder.trackers, say
        self._sent = read_json(self._file, dict[str, _Sent]) if self._file.exists() else {}
        self._unsent: list[Mapping[str, Any]] = []
        self._last_sent = time.monotonic()
        self._feeds: list[Feed] = []
        flat = flat_keys(asdict(recipe))
        for name in recipe.trackers:
            earlier = self._sent.get(name)
            opening = Opening(folder.path, flat, "" if earlier is None else earlier.identity, first_step)
            tracker = self._opened(name, opening)
            self._feeds.append(Feed(name, tracker))
            sent = _Sent(tracker.identity) if earlier is None else earlier
            if tracker.forgets_later_steps:
                sent = _Sent(sent.identity, min(sent.steps, first_step), min(sent.evaluated, first_step))
            self._sent[name] = sent
            self._write()  # at once: where the next cannot be opened, the run that this one began is gone on with
            self._say(f"tracked by {name}: {tracker.place}")

    def _opened(self, name: str, opening: Opening) -> Tracker:
        try:
            return _OPENERS[name](opening)
        except Exception as error:  # another library may raise anything
            for feed in self._feeds:
                feed.end(_SECONDS_OF_CLOSING)
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise InputError(f"trackers: {name} cannot be opened: {reason}; mend it, or leave it out") from error

    def steps(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Take the metrics of some steps; they are sent every ten seconds."""
        self._unsent += lines
        if time.monotonic() - self._last_sent >= _SECONDS_BETWEEN_SENDINGS:
            self._send_steps()
        self._tell_failures()

    def evaluated(self, step: int, totals: Mapping[str, Any]) -> None:
        """Send the numbers of an evaluation, and the steps so far."""
        self._send_steps()
        numbers = dict(_numbers(totals, "evaluation/"))
        for feed in self._feeds:
            if step > self._sent[feed.name].evaluated:
                self._sent[feed.name].evaluated = step
                feed.give(partial(feed.tracker.log, step, numbers))
        self._write()

    def files(self, pictures: Sequence[Path], others: Sequence[Path] = ()) -> None:
        """Send pictures, under the names of their files, and other files as they are."""
        for feed in self._feeds:
            for picture in pictures:
                feed.give(partial(feed.tracker.picture, f"pictures/{picture.stem}", picture))
            for file in others:
                feed.give(partial(feed.tracker.attach, file))

    def _send_steps(self) -> None:
        lines, self._unsent = self._unsent, []
        self._last_sent = time.monotonic()
        if not lines:
            return
        fresh = {
            feed.name: [line for line in lines if line["step"] > self._sent[feed.name].steps] for feed in self._feeds
        }
        for name in fresh:
            self._sent[name].steps = max(self._sent[name].steps, lines[-1]["step"])
        self._write()
        for feed in self._feeds:
            for line in fresh[feed.name]:
                numbers = {name: value for name, value in _numbers(line, "train/") if name != "train/step"}
                feed.give(partial(feed.tracker.log, line["step"], numbers))

    def _write(self) -> None:
        write_json_atomically(self._file, {name: msgspec.to_builtins(sent) for name, sent in self._sent.items()})

    def _tell_failures(self) -> None:
        """Report each tracker that has failed, once; it gets no further calls."""
        for feed in [feed for feed in self._feeds if feed.failure]:
            self._feeds.remove(feed)
            self._say(f"Warning: tracker {feed.name} is given up, the run goes on without it: {feed.failure}")

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._send_steps()
        for feed in self._feeds:
            feed.end(_SECONDS_OF_CLOSING)
        self._tell_failures()


def send_files(
    recipe: Recipe, folder: RunFolder, pictures: Sequence[Path], others: Sequence[Path], say: Callable[[str], None]
) -> None:
    """Send what was made after the last step to the trackers of a run. Raises InputError where one cannot be opened."""
    if recipe.trackers:
        sent = read_json(folder.trackers, dict[str, _Sent])
        last = max((own.steps for own in sent.values()), default=0)
        with Trackers(
            recipe, folder, last, lambda message: say(message) if message.startswith("Warning") else None
        ) as own:
            own.files(pictures, others)


def _numbers(line: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers of a line; names in nested mappings are whole paths."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif not isinstance(value, str):
            yield f"{prefix}{name}", float(value)
