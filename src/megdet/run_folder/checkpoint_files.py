"""checkpoints/: what a run needs to go on as if it had never stopped.

    checkpoints/step_00000123/            after 123 optimizer steps
        model.safetensors                 weights and buffers, by name
        optimizer.safetensors             momentum and the like, by name
        averages.safetensors              the averaged weights (EMA), where the recipe has them
        watch.safetensors                 the norms of the last gradients, for the watch for divergence
        state.json                        {"format": 3, "tensors": {"model": SHA-256, ...}, "state": {"step": 123, ...},
                                           "check": SHA-256}

"tensors" has the hash of every .safetensors file, "state" is a RunState, "check" the hash of both. All are checked when
they are read. Tensors are stored contiguous; a memory format such as channels_last belongs to the model that they are
loaded into.

A checkpoint is written into a hidden folder and renamed when all of it is on the disk. To delete one, it is renamed to
a hidden name first. The next save removes hidden folders left by an interrupted save. A damaged checkpoint that a run
skipped is renamed to damaged_step_00000123.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import msgspec
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megdet.errors import InputError
from megdet.files import cannot_write, read_json, reason_of, sync_folder, write_json_atomically
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_state import RunState
from megdet.tensor_file import load_tensors

_FORMAT = 3
_OLDEST_FORMAT = 2
_NAME = re.compile(r"step_(\d{8,})")
UNFINISHED = ".unfinished_"
"""Prefix of the names of folders that are being written or deleted."""

Kind = Literal["model", "optimizer", "averages", "agvm", "noise", "watch"]


class DamagedError(InputError):
    """A checkpoint is not what was saved; an earlier one may be sound."""


class OtherFormatError(InputError):
    """A checkpoint is of a newer megdet: nothing is wrong with it, so it must stay as it is."""


class LeftBehindError(InputError):
    """A checkpoint is saved, but an old one beside it could not be deleted."""


class _Format(msgspec.Struct):
    format: int
    state: Any = None


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    """state.json."""

    format: int
    tensors: dict[Kind, str]
    state: RunState
    check: str = ""
    """SHA-256 of the other fields, as far as the file has them; empty in files written before this field existed"""

    @classmethod
    def of(cls, tensors: dict[Kind, str], state: RunState) -> "_Content":
        content = cls(_FORMAT, tensors, state)
        content.check = content.digest()
        return content

    def digest(self, fields: Collection[str] | None = None) -> str:
        """The hash; `fields` are those of the state that the file has, where an older megdet knew fewer."""
        tensors, state = (msgspec.to_builtins(own, order="deterministic") for own in (self.tensors, self.state))
        known = {name: value for name, value in state.items() if fields is None or name in fields}
        return hashlib.sha256(msgspec.json.encode([self.format, tensors, known])).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose state has been read; its tensors are read on request."""

    path: Path
    state: RunState
    hashes: Mapping[Kind, str]
    """SHA-256 of every file of tensors"""

    def file(self, kind: Kind) -> Path:
        """The file of the tensors of one kind."""
        return self.path / f"{kind}.safetensors"

    def tensors(self, kind: Kind) -> dict[str, Tensor]:
        """The tensors of one kind, on the CPU. Raises InputError if the file is missing, damaged or another."""
        file, found = self.file(kind), ""
        if kind not in self.hashes:
            raise self.damaged(f"{self.path / 'state.json'} names no {file.name}")
        try:
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if found == self.hashes[kind]:
                return load_tensors(file)
        except (OSError, SafetensorError) as error:
            raise self.damaged(f"{file} cannot be read ({reason_of(error)})") from error
        raise self.damaged(f"{file} is not what was saved, its SHA-256 differs from that in state.json")

    def damaged(self, what: str) -> DamagedError:
        """The error for this checkpoint: what is wrong with it, and what to do."""
        return _damaged(self.path, what)


def save_checkpoint(
    folder: RunFolder,
    state: RunState,
    tensors: Mapping[Kind, Mapping[str, Tensor]],
    keep: int,
    spared: Collection[int] = (),
) -> Path:
    """Write the checkpoint of this state's step, then delete the oldest ones beyond `keep`, and those of later steps.

    Later steps are from before a roll-back of the run; a resume must not return to them.

    Args:
        folder: the run folder.
        state: the state that a resume needs besides tensors.
        tensors: kind (the file's name without suffix) -> name -> tensor on any device, in any memory format.
        keep: number of checkpoints to keep, at least 1; the one just written is never deleted.
        spared: steps up to this one whose checkpoints are kept at any age.

    Returns:
        The checkpoint's folder. A checkpoint of the same step is replaced.

    Raises:
        LeftBehindError: it is written, but a checkpoint that it replaces cannot be deleted.
        InputError: it cannot be written; the checkpoints that were there stay as they were.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    step = state.step
    final = checkpoint_path(folder, step)
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in folder.checkpoints.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)  # what stays was told of when it was to be deleted
        unfinished = _hidden(final, "")
        unfinished.mkdir()
        try:
            _write(unfinished, tensors, state)
            replaced = _rename(unfinished, final)
        except Exception:
            shutil.rmtree(unfinished, ignore_errors=True)  # make room again on a full disk
            raise
        sync_folder(folder.checkpoints)
        later = [_hide(path) for path in checkpoints(folder) if checkpoint_step(path) > step]
    except (OSError, SafetensorError) as error:
        raise cannot_write(final, error) from error
    _delete([*replaced, *later, *_old(folder, keep, spared)])
    return final


def delete_old_checkpoints(folder: RunFolder, keep: int, spared: Collection[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and those of the spared steps. Raises LeftBehindError."""
    _delete(_old(folder, keep, spared))


def delete_later_checkpoints(folder: RunFolder, step: int) -> None:
    """Delete the checkpoints of later steps, the newest first. Raises LeftBehindError."""
    _delete([path for path in reversed(checkpoints(folder)) if checkpoint_step(path) > step])


def _old(folder: RunFolder, keep: int, spared: Collection[int]) -> list[Path]:
    return [path for path in checkpoints(folder)[:-keep] if checkpoint_step(path) not in spared]


def checkpoints(folder: RunFolder) -> list[Path]:
    """The folders of all finished checkpoints, the oldest first."""
    if not folder.checkpoints.is_dir():
        return []
    found = [path for path in folder.checkpoints.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def latest_checkpoint(folder: RunFolder) -> Path | None:
    """The folder of the checkpoint with the most steps, None if there is none yet."""
    return next(reversed(checkpoints(folder)), None)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that no run goes on from it; returns its new path. Raises InputError."""
    aside = path.with_name(f"damaged_{path.name}")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        return path.rename(aside)
    except OSError as error:
        raise cannot_write(aside, error) from error


def checkpoint_step(path: Path) -> int:
    """The number of steps in a checkpoint folder's name. Raises InputError if it is not like `step_00000123`."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise InputError(f"{path} is not the folder of a checkpoint; those are named like step_00000123")
    return int(match[1])


def checkpoint_path(folder: RunFolder, step: int) -> Path:
    """The path of the checkpoint after so many steps, whether it exists or not."""
    return folder.checkpoints / f"step_{step:08d}"


def update_state(path: Path, state: RunState) -> None:
    """Replace the state of an existing checkpoint, atomically; its tensors stay. Raises InputError."""
    _write_content(path, _Content.of(dict(open_checkpoint(path).hashes), state))


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's state and no tensor.

    Raises:
        OtherFormatError: a newer megdet wrote it, or one too old.
        DamagedError: state.json is missing, damaged or of another step.
        InputError: the folder is missing.
    """
    if not path.is_dir():
        raise InputError(f"there is no checkpoint {path}; check the path")
    file = path / "state.json"
    try:
        found = read_json(file, _Format)
        if not _OLDEST_FORMAT <= found.format <= _FORMAT:
            mend = "update megdet" if found.format > _FORMAT else "go on with the version that began the run"
            known = f"this megdet reads {_OLDEST_FORMAT} and {_FORMAT}"
            raise OtherFormatError(f"{file} has format {found.format}, {known}: {mend}")
        content = read_json(file, _Content)
    except OtherFormatError:
        raise
    except InputError as error:
        raise _damaged(path, str(error)) from error
    if content.check and content.check != content.digest(found.state):
        raise _damaged(path, f"{file} is not what was saved, its SHA-256 differs from the one in it")
    if content.state.step != checkpoint_step(path):
        raise _damaged(path, f"{file} is of step {content.state.step}")
    return Checkpoint(path, content.state, content.tensors)


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(
        f"the checkpoint is damaged: {what}; delete the folder {path} and run the same command again, it goes on from "
        "the checkpoint before, if there is one"
    )


def _write(folder: Path, tensors: Mapping[Kind, Mapping[str, Tensor]], state: RunState) -> None:
    hashes: dict[Kind, str] = {}
    for kind, group in sorted(tensors.items()):
        file = folder / f"{kind}.safetensors"
        save_file(_storable(group), file)
        with file.open("rb") as written:
            hashes[kind] = hashlib.file_digest(written, "sha256").hexdigest()
            os.fsync(written.fileno())
    _write_content(folder, _Content.of(hashes, state))
    permissions = (folder / "state.json").stat().st_mode
    for kind in tensors:
        # safetensors makes files that only their owner can read
        (folder / f"{kind}.safetensors").chmod(permissions)
    sync_folder(folder)


def _write_content(folder: Path, content: _Content) -> None:
    write_json_atomically(folder / "state.json", msgspec.to_builtins(content), indent=2)


def _storable(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, each with memory of its own, as safetensors requires."""
    stored: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in group.items():
        copy = tensor.detach().cpu().contiguous()
        if copy.numel() < copy.untyped_storage().nbytes() // copy.element_size() or copy.data_ptr() in memory:
            copy = copy.clone()
        memory.add(copy.data_ptr())
        stored[name] = copy
    return stored


def _rename(unfinished: Path, final: Path) -> list[Path]:
    """Give the new checkpoint its name; an older one of the same step is moved away, and back if that fails.

    Returns where that one is, to be deleted.
    """
    if not final.exists():
        unfinished.rename(final)
        return []
    replaced = _hidden(final, "replaced_")
    final.rename(replaced)
    try:
        unfinished.rename(final)
    except OSError:
        replaced.rename(final)
        raise
    return [replaced]


def _hide(path: Path) -> Path:
    """Hide a checkpoint, so that an interrupted deletion never looks like a damaged one; returns its new path."""
    return path if path.name.startswith(UNFINISHED) else path.rename(_hidden(path, "deleted_"))


def _hidden(path: Path, why: str) -> Path:
    """A hidden name that is free: a folder of an earlier time that could not be deleted may still have the first."""
    name = f"{UNFINISHED}{why}{path.name}"
    names = chain([name], (f"{name}_{number}" for number in count(2)))
    return next(own for own in map(path.with_name, names) if not own.exists())


def _delete(paths: Sequence[Path]) -> None:
    """Delete checkpoints, hidden first. Raises LeftBehindError for the first that cannot be, after the others."""
    failed: LeftBehindError | None = None
    for path in paths:
        place = path
        try:
            place = _hide(path)
            shutil.rmtree(place)
        except OSError as error:
            failed = failed or LeftBehindError(
                f"an old checkpoint cannot be deleted ({reason_of(error)}): delete {place} yourself, nothing needs it"
            )
    if failed is not None:
        raise failed
