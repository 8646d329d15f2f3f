"""The result of one training of a sweep, as `outcome.json` in its run folder keeps it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

from megdet.errors import DivergedError, InputError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.files import read_json, write_json_atomically
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics, scores_of
from megdet.run_folder.sessions import read_environment

_OUTCOME = "outcome.json"
FIRST_STEPS, LAST_STEPS = 3, 10
"""Steps over which an outcome takes the mean of the loss, at the beginning and at the end."""


@dataclass(frozen=True)
class Failure:
    """Where and by what a training failed."""

    step: int
    """from 1"""
    why: str
    """what was not finite: `gradient_norm is not finite`"""
    last_norm: float | None
    """norm of the gradient of the step before it; None if there was none"""


@dataclass(frozen=True)
class Outcome:
    """The result of a row."""

    status: Literal["trained", "failed"]
    reason: str
    """why it failed"""
    steps: int
    """optimizer steps done"""
    hours: float
    """hours of all its steps, without evaluations"""
    ranks: int
    """number of processes at its end"""
    mmap: float | None
    """mmAP of the last evaluation, percent; None if the training failed or the data have no boxes"""
    ap50: float | None
    """AP at IoU 0.5, percent"""
    mmar: float | None
    """mean recall of the last evaluation, percent"""
    train_data: str
    """hash of its training images and boxes"""
    val_data: str
    """hash of its validation images and boxes"""
    weights: str = ""
    """SHA-256 of the file that its backbone started from; "" = none, or a row from before this was noted"""
    ranks_differ: bool = False
    """whether it was stopped and resumed with another number of processes"""
    failure: Failure | None = None
    """of a training that failed"""
    first_loss: float | None = None
    """mean loss of its first FIRST_STEPS steps"""
    last_loss: float | None = None
    """mean loss of its last LAST_STEPS steps"""
    command: str = ""
    """what was called, as a shell reads it"""
    commit: str = ""
    """of the code, with `+` after it where files were changed; empty outside a repository"""
    course: list[tuple[float, float]] = field(default_factory=list)
    """epoch and mmAP in percent of each evaluation; empty in a row from before this was noted"""


def read_outcome(folder: RunFolder) -> Outcome | None:
    """The outcome of a row, or None if it is not finished. Raises InputError if the file is damaged."""
    file = folder.path / _OUTCOME
    if not file.exists():
        return None
    try:
        return read_json(file, Outcome)
    except InputError as error:
        raise InputError(
            f"{file} is no outcome of a row: delete it, and the row is looked at again ({error})"
        ) from None


def write_outcome(
    folder: RunFolder,
    numbers: Evaluation | None,
    error: DivergedError | None,
    ranks: int,
    hashes: tuple[str, str, str],
) -> Outcome:
    """Write and return the outcome of a training that has ended.

    Args:
        folder: of the run.
        numbers: its last evaluation; None if it failed.
        error: of a training that failed.
        ranks: number of processes at its end.
        hashes: of the training data, the validation data and the weights.
    """
    lines = read_metrics(folder.metrics) if folder.metrics.exists() else []
    steps = [line for line in lines if "loss" in line]
    starts = read_environment(folder) if folder.environment.exists() else []
    last = steps[-1] if steps else {}
    losses = [line["loss"] for line in steps if "left_out" not in line]
    norms = [line["gradient_norm"] for line in steps if math.isfinite(line.get("gradient_norm", math.nan))]
    outcome = Outcome(
        status="failed" if numbers is None else "trained",
        reason="" if error is None else str(error),
        steps=last.get("step", 0),
        hours=sum(line["seconds"] for line in steps) / 3600,
        ranks=ranks,
        mmap=None if numbers is None else percent(numbers.bbox.AP),
        ap50=None if numbers is None else percent(numbers.bbox.AP50),
        mmar=None if numbers is None else percent(numbers.bbox.AR100),
        train_data=hashes[0],
        val_data=hashes[1],
        weights=hashes[2],
        ranks_differ=any(start["world_size"] != ranks for start in starts),
        failure=None if error is None else Failure(error.step, error.why, norms[-1] if norms else None),
        first_loss=_mean(losses[:FIRST_STEPS]),
        last_loss=_mean(losses[-LAST_STEPS:]),
        command=str(starts[-1].get("command", "")) if starts else "",
        commit=_commit(starts[-1].get("git")) if starts else "",
        course=[(own.epoch, own.mmap) for own in scores_of(lines)],
    )
    keep_outcome(folder, outcome)
    return outcome


def keep_outcome(folder: RunFolder, outcome: Outcome) -> None:
    """Write an outcome into a run folder: its row is finished. Raises InputError if that fails."""
    write_json_atomically(folder.path / _OUTCOME, asdict(outcome), indent=2)


def _mean(values: Sequence[float]) -> float | None:
    """The mean of the finite values; None where one is not finite, as at the end of a training that failed."""
    return fmean(values) if values and all(map(math.isfinite, values)) else None


def _commit(state: Mapping[str, Any] | None) -> str:
    """The commit of an entry of environment.json."""
    return "" if state is None else f"{state['commit']}{'+' if state['dirty'] else ''}"


def percent(number: float) -> float | None:
    """A COCO number in percent; None for -1, which means that the ground truth has no such box."""
    return None if number < 0 else 100 * number
