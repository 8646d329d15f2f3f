"""Compares the end of a disturbed run with that of the undisturbed run."""

import math
from collections.abc import Iterator
from typing import Any

from msgspec.structs import asdict
from torch import Tensor

from megdet.contract.verify import LIMITS, tensor_differences
from megdet.errors import InputError
from megdet.run_folder.checkpoint_files import Checkpoint, latest_checkpoint, open_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics

LIMIT = LIMITS["float64"]
_OF_THE_MACHINE = ("seconds", "data_seconds", "peak_memory_bytes")


def compare(reference: RunFolder, found: RunFolder, *, is_bitwise: bool) -> tuple[float, list[str]]:
    """The largest relative difference of two tensors of the last checkpoints, and a list of faults.

    If `is_bitwise`, compares the SHA-256 of every tensor file, the state, all lines of metrics.jsonl except times and
    memory, and the detections. Otherwise compares tensors to 1e-9, and which steps and evaluations there are. Raises
    InputError for a file that cannot be read.
    """
    ours, theirs = _last(reference), _last(found)
    if ours.state.step != theirs.state.step:
        return math.inf, [f"it ended at step {theirs.state.step}, the undisturbed run at {ours.state.step}"]
    worst, where = 0.0, ""
    if not is_bitwise or ours.hashes != theirs.hashes:
        worst, where = max((value, name) for name, value in tensor_differences(_tensors(ours), _tensors(theirs)))
    faults = list(_lines_of(reference, found, is_bitwise=is_bitwise))
    if is_bitwise and ours.hashes != theirs.hashes:
        kinds = ", ".join(kind for kind in ours.hashes if ours.hashes[kind] != theirs.hashes.get(kind))
        faults.insert(0, f"other SHA-256 of {kinds}: {where} differs by {worst:.2g}")
    elif worst > LIMIT:
        faults.insert(0, f"{where} differs by {worst:.2g}, allowed {LIMIT:g}")
    if is_bitwise and asdict(ours.state) != asdict(theirs.state):
        names = [name for name, value in asdict(ours.state).items() if value != getattr(theirs.state, name)]
        faults.append(f"other {', '.join(names)} in the state of the last checkpoint")
    if is_bitwise and reference.detections.read_bytes() != found.detections.read_bytes():
        faults.append("other detections.json")
    return worst, faults


def _last(folder: RunFolder) -> Checkpoint:
    path = latest_checkpoint(folder)
    if path is None:
        raise InputError(f"{folder.path} has no checkpoint")
    return open_checkpoint(path)


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {f"{kind}.{name}": tensor for kind in checkpoint.hashes for name, tensor in checkpoint.tensors(kind).items()}


def _lines_of(reference: RunFolder, found: RunFolder, *, is_bitwise: bool) -> Iterator[str]:
    """The faults in metrics.jsonl."""
    ours, theirs = _timeless(reference), _timeless(found)
    for kind in ("loss", "epoch_means", "evaluation"):
        # the order of an evaluation and a step may differ between runs
        own, their = ([line for line in lines if kind in line] for lines in (ours, theirs))
        steps, their_steps = ([line["step"] for line in lines] for lines in (own, their))
        if steps != their_steps:
            wrong = sorted({*steps} ^ {*their_steps} or {step for step in their_steps if their_steps.count(step) > 1})
            yield f"the lines of `{kind}` in metrics.jsonl are of other steps: {wrong[:5]} or their order"
        elif is_bitwise and own != their:
            step = next(mine["step"] for mine, other in zip(own, their, strict=True) if mine != other)
            yield f"another line of `{kind}` in metrics.jsonl at step {step}"


def _timeless(folder: RunFolder) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in _OF_THE_MACHINE}
        for line in read_metrics(folder.metrics)
    ]
