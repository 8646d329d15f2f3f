"""What is in a run folder, to compare runs in tests."""

from pathlib import Path
from typing import Any

from torch import Tensor

from megdet.run_folder.checkpoint_files import Kind, checkpoint_step, checkpoints, open_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.ledger import course, read_chain
from megdet.run_folder.metrics import read_metrics
from megdet.run_folder.run_state import RunState


def evaluation_lines(folder: RunFolder) -> list[tuple[int, Any]]:
    return [(line["step"], line["evaluation"]) for line in read_metrics(folder.metrics) if "evaluation" in line]


def training_lines(folder: RunFolder) -> list[dict[str, Any]]:
    lines = [line for line in read_metrics(folder.metrics) if "loss" in line]
    return [{key: line[key] for key in line if not key.endswith(("seconds", "memory_bytes"))} for line in lines]


def states(folder: RunFolder) -> dict[int, dict[str, str]]:
    """The digests of all state by step, as the ledger has them."""
    return {entry.step: entry.state for entry in course(read_chain(folder.ledger).entries)}


def content(folder: RunFolder) -> dict[str, bytes]:
    """Every file but those that tell the time and the starts, by its path."""
    files = (path for path in folder.path.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder.path)): path.read_bytes()
        for path in files
        if path not in (folder.environment, folder.metrics, folder.ledger)
    }


def assert_same_run(ours: RunFolder, theirs: RunFolder) -> None:
    assert evaluation_lines(ours) == evaluation_lines(theirs)
    assert training_lines(ours) == training_lines(theirs)
    assert content(ours) == content(theirs)
    mine, others = states(ours), states(theirs)
    assert {step: mine[step] for step in mine if step in others} == {s: others[s] for s in others if s in mine}


def load_checkpoint(path: Path) -> tuple[dict[Kind, dict[str, Tensor]], RunState]:
    """All tensors of a checkpoint, and its state."""
    checkpoint = open_checkpoint(path)
    return {kind: checkpoint.tensors(kind) for kind in checkpoint.hashes}, checkpoint.state


def steps(folder: RunFolder) -> list[int]:
    return [checkpoint_step(path) for path in checkpoints(folder)]
