"""checkpoints/: what a run needs to go on as if it had never stopped.

    checkpoints/step_00000123/            after 123 optimizer steps
        model.safetensors                 weights and buffers, by name
        optimizer.safetensors             momentum and the like, by name
        averages.safetensors              the averaged weights (EMA), where the recipe has them
        state.json                        {"format": 1, "step": 123, "tensors": ["averages", "model", ...], "state": {}}

"tensors" lists the .safetensors files, "state" is the caller's (JSON; numbers that are not finite as in metrics.jsonl).
Tensors are stored contiguous; a memory format such as channels_last belongs to the model that they are loaded into.

A checkpoint appears under its name when all of it is on the disk: it is written into a hidden folder beside and then
renamed. It disappears the same way round. Folders that an interrupted save left hidden are removed by the next save.
"""

import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megdet.errors import InputError
from megdet.files import cannot_write, read_json, sync_folder, write_json_atomically
from megdet.journal.run_folder import RunFolder, decode_non_finite, encode_non_finite
from megdet.tensor_file import load_tensors

_FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")
_HIDDEN = ".unfinished_"


def save_checkpoint(
    folder: RunFolder,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    spared: Collection[int] = (),
) -> Path:
    """Write the checkpoint of this step, then delete the oldest ones beyond `keep`, and those of later steps.

    Later steps belong to a course that the run has left, by a roll-back; a resume must not return to it.

    Args:
        folder: the run folder.
        step: optimizer steps done.
        tensors: file name without suffix ("model", "optimizer", "averages") -> name -> tensor of any device and
            memory format.
        state: whatever else a resume needs, as JSON can say it.
        keep: number of checkpoints to keep, at least 1; the one just written is never deleted.
        spared: steps up to this one whose checkpoints stay however old they are.

    Returns:
        The checkpoint's folder. One of the same step is replaced.

    Raises:
        InputError: it cannot be written; the checkpoints that were there stay as they were.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep must be at least 1 and step at least 0, not {keep} and {step}")
    final = checkpoint_path(folder, step)
    unfinished = folder.checkpoints / f"{_HIDDEN}{final.name}"
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in folder.checkpoints.glob(f"{_HIDDEN}*"):
            shutil.rmtree(leftover)
        unfinished.mkdir()
        try:
            _write(unfinished, step, tensors, state)
            _rename(unfinished, final)
        except Exception:
            shutil.rmtree(unfinished, ignore_errors=True)  # a full disk must not stay full
            raise
        sync_folder(folder.checkpoints)
        for path in checkpoints(folder):
            if checkpoint_step(path) > step:
                _delete(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(final, error) from error
    delete_old_checkpoints(folder, keep, spared)
    return final


def delete_old_checkpoints(folder: RunFolder, keep: int, spared: Collection[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and those of the spared steps. Raises InputError."""
    for path in checkpoints(folder)[:-keep]:
        if checkpoint_step(path) not in spared:
            try:
                _delete(path)
            except OSError as error:
                raise cannot_write(path, error) from error


def checkpoints(folder: RunFolder) -> list[Path]:
    """The folders of all finished checkpoints, the oldest first."""
    if not folder.checkpoints.is_dir():
        return []
    found = [path for path in folder.checkpoints.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def latest_checkpoint(folder: RunFolder) -> Path | None:
    """The folder of the checkpoint with the most steps, None where there is none yet."""
    return next(reversed(checkpoints(folder)), None)


def checkpoint_step(path: Path) -> int:
    """The number of steps in a checkpoint folder's name. Raises InputError where the name is no `step_00000123`."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise InputError(f"{path} is not the folder of a checkpoint; those are named like step_00000123")
    return int(match[1])


def checkpoint_path(folder: RunFolder, step: int) -> Path:
    """Where the checkpoint after so many steps is, or would be."""
    return folder.checkpoints / f"step_{step:08d}"


def update_state(path: Path, state: Mapping[str, Any]) -> None:
    """Replace the state of a checkpoint that is there, atomically; its tensors stay. Raises InputError."""
    content = read_json(path / "state.json")
    write_json_atomically(path / "state.json", {**content, "state": encode_non_finite(state)}, indent=2)


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors (on the CPU) and the state of a checkpoint, as they were given to `save_checkpoint`.

    Raises:
        InputError: the folder is missing, or a file in it is missing or damaged; the message names the file.
    """
    content, mend = _read_content(path), _mend(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        for name in content["tensors"]:
            file = path / f"{name}.safetensors"
            try:
                tensors[name] = load_tensors(file)
            except (OSError, SafetensorError) as error:
                reason = " ".join(str(error).split())
                raise InputError(f"the checkpoint is damaged: {file} cannot be read ({reason}); {mend}") from error
        return tensors, decode_non_finite(content["state"])
    except (KeyError, TypeError) as error:
        raise InputError(f"the checkpoint is damaged: {path / 'state.json'} lacks a key ({error}); {mend}") from error


def load_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint alone. Raises InputError as `load_checkpoint` does."""
    state = decode_non_finite(_read_content(path).get("state"))
    if not isinstance(state, dict):
        raise InputError(f"the checkpoint is damaged: {path / 'state.json'} lacks a key ('state'); {_mend(path)}")
    return state


def _read_content(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(f"there is no checkpoint {path}; check the path")
    try:
        content = read_json(path / "state.json")
    except InputError as error:
        raise InputError(f"the checkpoint is damaged: {error}; {_mend(path)}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise InputError(
            f"{path / 'state.json'} has format {found!r}, this megdet reads format {_FORMAT}; {_mend(path)}"
        )
    return content


def _mend(path: Path) -> str:
    return f"delete the folder {path} and run the same command again, it goes on from the checkpoint before"


def _write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    content = {"format": _FORMAT, "step": step, "tensors": sorted(tensors), "state": encode_non_finite(state)}
    write_json_atomically(folder / "state.json", content, indent=2)
    permissions = (folder / "state.json").stat().st_mode
    for name, group in tensors.items():
        file = folder / f"{name}.safetensors"
        save_file(_storable(group), file)
        file.chmod(permissions)  # safetensors makes files for their owner alone; others may want to read a run
        with file.open("rb") as written:
            os.fsync(written.fileno())
    sync_folder(folder)


def _storable(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, each with memory of its own: safetensors refuses others."""
    stored: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in group.items():
        copy = tensor.detach().cpu().contiguous()
        if copy.numel() < copy.untyped_storage().nbytes() // copy.element_size() or copy.data_ptr() in memory:
            copy = copy.clone()
        memory.add(copy.data_ptr())
        stored[name] = copy
    return stored


def _rename(unfinished: Path, final: Path) -> None:
    """Give the new checkpoint its name; an older one of the same step makes room, and comes back if that fails."""
    if not final.exists():
        unfinished.rename(final)
        return
    replaced = final.with_name(f"{_HIDDEN}replaced_{final.name}")
    final.rename(replaced)
    try:
        unfinished.rename(final)
    except OSError:
        replaced.rename(final)
        raise
    shutil.rmtree(replaced)


def _delete(path: Path) -> None:
    """Delete a checkpoint: hidden first, so that an interrupted deletion never looks like a damaged checkpoint."""
    hidden = path.with_name(f"{_HIDDEN}deleted_{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden)
