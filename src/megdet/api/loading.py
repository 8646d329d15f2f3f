"""`megdet.load`: from a run, a checkpoint, a repository on the hub or an exported file to a function of images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megdet.api.detector import LoadedDetector
from megdet.api.exported_file import LoadedFile
from megdet.errors import InputError
from megdet.exported.programs import is_exported
from megdet.inference.fold import fold_batch_norms
from megdet.inference.trained import load_detector, precision_here
from megdet.recipe_check import flat_keys
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_path import run_of
from megdet.runtime import device_of_rank, prepare_process

_HUB = "hf://"


def load(
    path: str | Path, *, device: str = "", overrides: Mapping[str, Any] | None = None, fold: bool = False
) -> LoadedDetector:
    """A trained detector, ready to be called with images.

    Args:
        path: a run folder (its newest checkpoint), one of its checkpoints (`runs/a/checkpoints/step_00000100`,
            `runs/a/checkpoints/best`), a repository on the Hugging Face hub (`hf://owner/name`), or a file of
            `megdet export`, which takes no other argument.
        device: cpu or cuda; empty is a GPU where there is one. A detector in bfloat16 computes in float32 on a machine
            that is slow at bfloat16; the results differ a little.
        overrides: keys of its recipe to change, dotted, {"evaluation.flip": True}, or nested.
        fold: fold the batch norms into the convolutions before them: quicker, and the same to rounding.

    Raises:
        InputError: it is no run, has no checkpoint, or does not fit; the hub does not answer.
    """
    if is_exported(path):
        if device or overrides or fold:
            raise InputError(f"{path}: an exported file is as it is: leave out device, overrides and fold")
        return LoadedFile(Path(path))
    folder, step = _place(path)
    own_device = device_of_rank(device, 0)
    prepare_process(own_device)
    changed, _ = precision_here(folder, flat_keys(dict(overrides or {})), own_device)
    trained = load_detector(folder, own_device, changed, step=step)
    if fold:
        fold_batch_norms(trained.model)
    return LoadedDetector(trained, is_folded=fold)


def _place(name: str | Path) -> tuple[RunFolder, int | None]:
    """The run folder of a path or of a name on the hub, and the step if it is a checkpoint."""
    if str(name).startswith(_HUB):
        from megdet.export.hub import cached_run

        return cached_run(str(name).removeprefix(_HUB)), None
    folder, step = run_of(name)
    if not folder.path.exists():
        raise InputError(f"{folder.path}: no such run folder")
    return folder, step
