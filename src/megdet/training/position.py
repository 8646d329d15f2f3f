"""How far a run has come: its step, its evaluations, its roll-backs, and how checkpoints are told of them."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from megdet.data.coco import CocoDataset
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.run_folder.checkpoint_files import (
    checkpoint_path,
    checkpoint_step,
    checkpoints,
    delete_later_checkpoints,
    open_checkpoint,
    update_state,
)
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_state import RunState
from megdet.training.datasets import fingerprint
from megdet.training.stops import Stops


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0
    """steps done when it was opened"""
    numbers: Evaluation | None = None
    """the last evaluation"""
    evaluated_step: int = -1
    """the step after which that evaluation was made, -1 for none"""
    unevaluated: tuple[int, ...] = ()
    """steps with a checkpoint that was not evaluated, the oldest first"""
    best_score: float | None = None
    """the highest mmAP of all evaluations"""
    best_step: int = -1
    """the step of that evaluation, -1 for none"""
    roll_backs: int = 0
    """roll-backs so far: how often the run went back to a checkpoint because it diverged"""
    rolled_back_to: int = -1
    """the step of the checkpoint of the last roll-back, -1 for none"""
    val_data: str = ""
    """fingerprint of the validation data of the best score; empty if unknown"""
    warnings: tuple[str, ...] = ()
    """messages for the user: the damaged checkpoints that were skipped"""

    def evaluated(self, step: int, numbers: Evaluation) -> "Position":
        """The position with this evaluation, as the last one if no later step is evaluated."""
        found = self
        if step >= self.evaluated_step:
            found = replace(found, numbers=numbers, evaluated_step=step)
        if self.best_score is None or self.best_score < numbers.bbox.AP:
            found = replace(found, best_score=numbers.bbox.AP, best_step=step)
        return found


def without_other_scores(position: Position, val: CocoDataset) -> Position:
    """The position without its best score, and with a warning, if that is of other validation data than these."""
    if position.best_score is None or position.val_data in ("", fingerprint(val)):
        return position
    warning = (
        f"Warning: {val.annotations_file} has other images or boxes than the run was evaluated on before, so its best "
        f"score ({100 * position.best_score:.1f} at step {position.best_step}) is not compared with new ones, and the "
        "checkpoint of that step is no longer kept as the best"
    )
    return replace(position, best_score=None, best_step=-1, warnings=(*position.warnings, warning))


def mark_evaluated(folder: RunFolder, step: int, numbers: Evaluation, position: Position, val_data: str) -> None:
    """Write an evaluation of a step into the checkpoints of this step and of later ones that have none of a later step.

    Those were written while it went on. All of them get the best score of the position, and `val_data`, the fingerprint
    of the images. Raises InputError.
    """
    best = {"best_score": position.best_score, "best_step": position.best_step, "val_data": val_data}
    # newest first: if the run is killed on the way, its own checkpoint is not marked and is evaluated again
    for path in reversed(checkpoints(folder)):
        if checkpoint_step(path) >= step:
            state, known = open_checkpoint(path).state, dict[str, Any](best)
            if state.evaluated_step <= step:
                known |= {"evaluation": numbers.as_dict(), "evaluated_step": step}
            update_state(path, msgspec.structs.replace(state, **known))


def newest_checkpoint(folder: RunFolder, is_wanted: Callable[[int], bool]) -> int:
    """The step of the newest checkpoint whose step is wanted, 0 for none."""
    return next((step for step in map(checkpoint_step, reversed(checkpoints(folder))) if is_wanted(step)), 0)


def kept_to_go_back(folder: RunFolder, stops: Stops, step: int) -> set[int]:
    """The steps whose checkpoints a roll-back may need, after the one of a step was given to be written.

    Writing it may fail, so that on the disk stays too.
    """
    kept = {stops.newest_saved(step)}
    with suppress(OSError):  # a folder that cannot be read is told of when the checkpoint is written
        kept.add(newest_checkpoint(folder, stops.is_saved_after))
    return kept


def _best_until(folder: RunFolder, state: RunState) -> dict[str, Any]:
    """The best of the evaluations, on the same data, of checkpoints that are there until that of a state."""
    found: dict[int, float] = {}
    for path in checkpoints(folder):
        if checkpoint_step(path) > state.step:
            continue
        with suppress(InputError):  # a damaged one knows nothing; the run does not go back to it
            own = open_checkpoint(path).state
            if own.val_data != state.val_data:
                continue
            if own.best_score is not None:
                found[own.best_step] = own.best_score
            if own.evaluation is not None:
                found[own.evaluated_step] = own.evaluation["bbox"]["AP"]
    there = [step for step in found if step <= state.step and checkpoint_path(folder, step).is_dir()]
    best_step = max(there, key=lambda step: found[step], default=-1)
    return {"best_score": found.get(best_step), "best_step": best_step}


def mark_rolled_back(folder: RunFolder, step: int, roll_backs: int) -> None:
    """Write into the checkpoint of a step that the run goes back to it, for so many times, and delete later ones.

    Raises InputError.
    """
    path = checkpoint_path(folder, step)
    state, known = open_checkpoint(path).state, dict[str, Any](roll_backs=roll_backs, rolled_back_to=step)
    if state.best_step > step:  # it was evaluated late, when a later checkpoint was the best, which is deleted now
        known |= _best_until(folder, state)
    update_state(path, msgspec.structs.replace(state, **known))
    delete_later_checkpoints(folder, step)  # last: a run that is killed before it diverges and comes here again
