"""A thread writes checkpoints from copies in memory: nothing real is trained here."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megdet.errors import InputError
from megdet.run_folder.checkpoint_files import LeftBehindError, checkpoint_step, checkpoints, latest_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.training import checkpoint_writer
from megdet.training.checkpoint_writer import CheckpointWriter
from megdet.training.trainer import Tensors
from run_folders import load_checkpoint
from small_runs import run_state


@pytest.fixture
def folder(tmp_path: Any) -> RunFolder:
    return RunFolder(tmp_path / "run").create()


@pytest.fixture
def writer(folder: RunFolder) -> Iterator[CheckpointWriter]:
    own = CheckpointWriter(folder, keep=1, saved_step=0)
    yield own
    own.leave(RuntimeError)


def tensors(value: float) -> Tensors:
    image = torch.full((1, 2, 3, 4), value).to(memory_format=torch.channels_last)
    return {"model": {"weight": image, "count": torch.tensor(int(value))}, "optimizer": {}}


def steps(folder: RunFolder) -> list[int]:
    return [checkpoint_step(path) for path in checkpoints(folder)]


def full_from(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint_writer.save_checkpoint

    def full(folder: Any, state: Any, *arguments: Any) -> Any:
        if state.step >= step:
            raise InputError("no space left on device")
        return save(folder, state, *arguments)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", full)


def test_the_training_goes_on_while_a_checkpoint_of_before_is_written(
    folder: RunFolder, writer: CheckpointWriter
) -> None:
    may_write, own = threading.Event(), tensors(1)
    writer.save(run_state(1), own, [], first=lambda: may_write.wait(60) and None)
    own["model"]["weight"] += 1  # the next step
    assert writer.is_writing
    assert steps(folder) == []
    may_write.set()
    writer.wait()
    assert writer.saved_step == 1
    found = latest_checkpoint(folder)
    assert found is not None
    assert torch.equal(load_checkpoint(found)[0]["model"]["weight"], torch.full((1, 2, 3, 4), 1.0))
    writer.save(run_state(2), {**own, "noise": {"averages": torch.ones(2)}}, [])  # into the same memory
    writer.wait()
    found = latest_checkpoint(folder)
    assert found is not None
    saved = load_checkpoint(found)[0]
    assert torch.equal(saved["model"]["weight"], torch.full((1, 2, 3, 4), 2.0))
    assert saved.keys() == {"model", "optimizer", "noise"}
    assert steps(folder) == [2]


def test_a_line_of_the_ledger_does_not_wait_for_a_checkpoint_that_is_being_written(
    folder: RunFolder, writer: CheckpointWriter
) -> None:
    may_write, own = threading.Event(), tensors(1)
    seen: list[tuple[float, list[int]]] = []

    def look(copy: Tensors) -> None:
        seen.append((copy["model"]["weight"].max().item(), steps(folder)))

    writer.save(run_state(1), own, [], first=lambda: may_write.wait(60) and None)
    own["model"]["weight"] += 1  # the next step
    writer.look_at_copy(own, look)
    assert writer.is_writing
    own["model"]["weight"] += 1
    may_write.set()
    writer.look_at_copy(own, look)
    writer.wait()
    assert seen == [(2.0, [1]), (3.0, [1])], "in the order in which they were given, each with its own values"
    found = latest_checkpoint(folder)
    assert found is not None
    assert torch.equal(load_checkpoint(found)[0]["model"]["weight"], torch.full((1, 2, 3, 4), 1.0))


def test_a_full_disk_keeps_the_old_checkpoint_and_is_said_once_each(
    folder: RunFolder, writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_from(2, monkeypatch)
    for step in (1, 2, 3):
        writer.save(run_state(step), tensors(step), [])
    writer.wait()
    kept = "the run goes on, the checkpoint of step 1 is kept"
    assert writer.failures() == [
        f"Warning: the checkpoint of step {step} is not saved: no space left on device; {kept}" for step in (2, 3)
    ]
    assert writer.failures() == []
    assert steps(folder) == [1]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    folder: RunFolder, writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint_writer.save_checkpoint

    def save_and_leave(*arguments: Any) -> None:
        save(*arguments)
        raise LeftBehindError("an old checkpoint cannot be deleted")

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", save_and_leave)
    writer.save(run_state(3), tensors(3), [])
    writer.wait()
    assert writer.saved_step == 3
    assert writer.failures() == [
        "Warning: an old checkpoint cannot be deleted; the run goes on, the checkpoint of step 3 is kept"
    ]
    writer.save(run_state(4), tensors(4), [])
    writer.leave(None)
    assert steps(folder) == [4]


def test_a_run_ends_when_it_has_no_checkpoint_at_all(writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    full_from(1, monkeypatch)
    writer.save(run_state(1), tensors(1), [])
    writer.wait()
    with pytest.raises(InputError, match="no space left"):
        writer.failures()


def test_a_failure_that_nobody_asked_about_is_raised_at_the_end(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_from(2, monkeypatch)
    own = CheckpointWriter(folder, keep=1, saved_step=0)
    for step in (1, 2):
        own.save(run_state(step), tensors(step), [])
    with pytest.raises(InputError, match="no space left"):
        own.leave(None)


def test_what_comes_after_work_is_left_out_where_that_failed(writer: CheckpointWriter) -> None:
    done: list[str] = []

    def fail() -> None:
        raise InputError("no space left on device")

    writer.later(fail, lambda: done.append("line of the evaluation"))
    writer.later(lambda: done.append("mark"), lambda: done.append("line"))
    writer.wait()
    assert done == ["mark", "line"]
