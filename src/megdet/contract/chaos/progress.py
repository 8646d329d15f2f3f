"""The activity and progress of a run, read from its folder only."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import UNFINISHED, checkpoint_step, checkpoints
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics

Activity = Literal["loading", "stepping", "saving", "evaluating"]
"""loading is the time from the start of the command until it has claimed its folder"""


@dataclass(frozen=True)
class Progress:
    """The state of a run at one moment."""

    step: int
    """step of the last line of a step in metrics.jsonl"""
    activity: Activity


class Watched:
    """A run folder while a command works in it.

    Args:
        folder: the run folder, which need not exist yet.
        recipe: the recipe of the run.
        epochs: epochs of the whole run.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, epochs: int) -> None:
        self.folder, self.recipe, self.epochs = folder, recipe, epochs
        self._starts = self.num_starts()

    def num_starts(self) -> int:
        """Number of commands that have claimed the folder."""
        try:
            return len(json.loads(self.folder.environment.read_bytes())["sessions"])
        except (OSError, ValueError, KeyError):
            return 0

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written or deleted."""
        try:
            return any(path.name.startswith(UNFINISHED) for path in self.folder.checkpoints.iterdir())
        except OSError:
            return False

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        try:
            return read_metrics(self.folder.metrics)
        except InputError:
            return []

    def now(self) -> Progress:
        """The step and the activity of the run."""
        lines = self.lines()
        step = max((line["step"] for line in lines if "loss" in line), default=0)
        if self.num_starts() == self._starts:
            return Progress(step, "loading")
        if self.is_saving:
            return Progress(step, "saving")
        return Progress(step, "evaluating" if lines and self._is_evaluated_next(lines) else "stepping")

    def _is_evaluated_next(self, lines: list[dict[str, Any]]) -> bool:
        """Whether the last line ended an epoch whose evaluation is due (one in the background has a hidden folder)."""
        if any(self.folder.path.glob(".evaluation_*")):
            return True
        every, last = self.recipe.evaluation.every_epochs, lines[-1]
        if "epoch_means" not in last:
            return False
        epoch = last["epoch_means"]["epoch"]
        return bool(every and epoch % every == 0) or epoch == self.epochs

    def saved_step(self) -> int:
        """The step of the newest checkpoint, 0 for none."""
        return max(map(checkpoint_step, checkpoints(self.folder)), default=0)

    def trace(self) -> tuple[object, ...]:
        """A value that changes whenever the run makes progress."""
        return self.num_starts(), *(_stamp(path) for path in (self.folder.metrics, *checkpoints(self.folder)))


def _stamp(path: Path) -> tuple[str, int]:
    try:
        return path.name, path.stat().st_mtime_ns
    except OSError:
        return path.name, 0
