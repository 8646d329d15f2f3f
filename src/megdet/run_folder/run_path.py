"""What a path that a user gives names: a run folder, or one of its checkpoints."""

import re
from pathlib import Path

from megdet.errors import InputError
from megdet.files import is_file
from megdet.run_folder.checkpoint_files import (
    checkpoint_path,
    checkpoint_step,
    checkpoints,
    latest_checkpoint,
    open_checkpoint,
)
from megdet.run_folder.folder import RunFolder


def run_of(path: str | Path) -> tuple[RunFolder, int | None]:
    """The run folder that a path names, and the step where it names one of its checkpoints.

    A checkpoint is named by its folder, `RUN/checkpoints/step_00000100`; `RUN/checkpoints/best` is the one with the
    highest mmAP.

    Raises:
        InputError: there is no such checkpoint; of the best: nothing was evaluated yet, or it was not kept.
    """
    own = Path(path)
    try:
        whole = own.resolve()  # "step_00000100" alone, inside the folder of the checkpoints
    except (OSError, RuntimeError, ValueError):  # such as a link to itself: who reads the folder says so
        return RunFolder(own), None
    folder = RunFolder(whole.parent.parent)
    if whole.parent.name != folder.checkpoints.name or is_file(RunFolder(own).recipe):
        return RunFolder(own), None
    if is_file(own / "state.json"):
        return folder, checkpoint_step(whole)
    if not is_file(folder.recipe):
        return RunFolder(own), None
    if whole.name == "best":
        return folder, _best_step(own, folder)
    if re.fullmatch(r"step_\d+", whole.name):
        there = ", ".join(known.name for known in checkpoints(folder)) or "none"
        raise InputError(f"{own}: no such checkpoint; there are {there}")
    return RunFolder(own), None


def _best_step(own: Path, folder: RunFolder) -> int:
    newest = latest_checkpoint(folder)
    state = None if newest is None else open_checkpoint(newest).state
    if state is None or state.evaluation is None:
        raise InputError(f"{own}: nothing was evaluated yet, so no checkpoint is the best")
    if state.best_step < 0:
        raise InputError(f"{own}: it is not known which checkpoint is the best: name the folder of a step")
    if not checkpoint_path(folder, state.best_step).is_dir():
        raise InputError(
            f"{own}: the checkpoint of step {state.best_step}, the best, is not there; runs with keep_best keep it: "
            "name another"
        )
    return state.best_step


def suffix_of(step: int | None) -> str:
    """What the name of a file or folder ends with that is of the checkpoint of a step; None is the newest."""
    return "" if step is None else f"-step-{step}"
