import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from megdet.errors import InputError
from megdet.run_folder.checkpoint_files import checkpoint_path, open_checkpoint, save_checkpoint, update_state
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_path import run_of
from small_runs import run_state


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Checkpoints of steps 3 and 7, of which that of step 3 is the best."""
    folder = RunFolder(tmp_path / "run").create()
    for step in (3, 7):
        save_checkpoint(folder, run_state(step), {"model": {"x": torch.zeros(1)}, "optimizer": {}}, keep=2)
    note_best(folder, 3)
    return folder


def note_best(folder: RunFolder, step: int) -> None:
    newest = checkpoint_path(folder, 7)
    update_state(newest, msgspec.structs.replace(open_checkpoint(newest).state, best_step=step, best_score=0.5))


def named(path: str | Path) -> tuple[Path, int | None]:
    folder, step = run_of(path)
    return folder.path, step


def test_a_run_and_its_checkpoints_are_told_apart_from_anywhere(folder, monkeypatch):
    assert named(folder.path) == (folder.path, None)
    assert named(str(folder.checkpoints / "step_00000007")) == (folder.path, 7)
    assert named(folder.checkpoints / "best") == (folder.path, 3)
    monkeypatch.chdir(folder.checkpoints)
    assert named("best") == named("step_00000003") == (folder.path, 3)
    monkeypatch.chdir(folder.path.parent)
    assert named("run") == (Path("run"), None)
    assert named("run/checkpoints/step_00000005") == (Path("run/checkpoints/step_00000005"), None)


def test_a_best_checkpoint_that_is_not_there_is_told(folder):
    shutil.rmtree(checkpoint_path(folder, 3))
    with pytest.raises(InputError, match=r"checkpoints/best: the checkpoint of step 3, the best, was not kept"):
        run_of(folder.checkpoints / "best")
    note_best(folder, -1)
    with pytest.raises(InputError, match=r"checkpoints/best: nothing was evaluated yet"):
        run_of(folder.checkpoints / "best")
