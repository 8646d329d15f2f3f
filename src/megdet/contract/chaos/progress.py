"""What a run is doing and how far it is, seen from outside: its folder alone is read."""

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
"""loading is from the start of the command until it has claimed its folder: programs, data, the checkpoint"""


@dataclass(frozen=True)
class Progress:
    """What the folder shows at one moment."""

    step: int
    """of the last line of metrics.jsonl that is of a step"""
    activity: Activity


class Watched:
    """A run folder while a command works in it.

    Args:
        folder: the run folder, which need not exist yet.
        recipe: of the run.
        epochs: of the whole run.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, epochs: int) -> None:
        self.folder, self.recipe, self.epochs = folder, recipe, epochs
        self._starts = self.num_starts()

    def begins(self) -> None:
        """Note that a command starts now."""
        self._starts = self.num_starts()

    def num_starts(self) -> int:
        """How many commands have claimed the folder."""
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
        """How far it is, and what it is doing."""
        lines = self.lines()
        step = max((line["step"] for line in lines if "loss" in line), default=0)
        if self.num_starts() == self._starts:
            return Progress(step, "loading")
        if self.is_saving:
            return Progress(step, "saving")
        return Progress(step, "evaluating" if lines and self._is_evaluated_next(lines) else "stepping")

    def _is_evaluated_next(self, lines: list[dict[str, Any]]) -> bool:
        """Whether the last line ended an epoch whose evaluation is due; beside the steps it has a hidden folder."""
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
        """Something that changes as long as the run makes any progress."""
        return self.num_starts(), *(_stamp(path) for path in (self.folder.metrics, *checkpoints(self.folder)))


def _stamp(path: Path) -> tuple[str, int]:
    try:
        return path.name, path.stat().st_mtime_ns
    except OSError:
        return path.name, 0
