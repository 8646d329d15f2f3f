"""What a path that a user gives names: a run folder, or one of its checkpoints."""

from pathlib import Path

from megdet.errors import InputError
from megdet.run_folder.checkpoint_files import checkpoint_path, checkpoint_step, latest_checkpoint, open_checkpoint
from megdet.run_folder.folder import RunFolder


def run_of(path: str | Path) -> tuple[RunFolder, int | None]:
    """The run folder that a path names, and the step where it names one of its checkpoints.

    A checkpoint is named by its folder, `RUN/checkpoints/step_00000100`; `RUN/checkpoints/best` is the one with the
    highest mmAP.

    Raises:
        InputError: nothing was evaluated yet, or the best checkpoint was not kept.
    """
    own = Path(path)
    whole = own.resolve()  # "step_00000100" alone, inside the folder of the checkpoints
    if whole.parent.name != RunFolder(own).checkpoints.name:
        return RunFolder(own), None
    if (own / "state.json").is_file():
        return RunFolder(whole.parent.parent), checkpoint_step(whole)
    if whole.name != "best":
        return RunFolder(own), None
    folder = RunFolder(whole.parent.parent)
    newest = latest_checkpoint(folder)
    step = -1 if newest is None else open_checkpoint(newest).state.best_step
    if step < 0:
        raise InputError(f"{own}: nothing was evaluated yet, so no checkpoint is the best")
    if not checkpoint_path(folder, step).is_dir():
        raise InputError(f"{own}: the checkpoint of step {step}, the best, was not kept (keep_best): name another")
    return folder, step


def suffix_of(step: int | None) -> str:
    """What the name of a file or folder ends with that is of the checkpoint of a step; None is the newest."""
    return "" if step is None else f"-step-{step}"
