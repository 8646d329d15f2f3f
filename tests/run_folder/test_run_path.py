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
    folder.write_recipe("seed: 1\n")
    note_best(folder, 3)
    return folder


def note_best(folder: RunFolder, step: int) -> None:
    newest = checkpoint_path(folder, 7)
    known = {"best_step": step, "best_score": 0.5, "evaluation": {"bbox": {"AP": 0.5}}}
    update_state(newest, msgspec.structs.replace(open_checkpoint(newest).state, **known))


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
    assert named("run/checkpoints/other") == (Path("run/checkpoints/other"), None)


def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(folder):
    with pytest.raises(InputError, match=r"5: no such checkpoint; there are step_00000003, step_00000007$"):
        run_of(folder.checkpoints / "step_00000005")


def test_a_run_folder_may_have_the_name_of_a_checkpoint(tmp_path):
    own = RunFolder(tmp_path / "checkpoints" / "best").create()
    own.write_recipe("seed: 1\n")
    assert named(own.path) == (own.path, None)


def test_a_path_that_leads_nowhere_is_left_to_whom_reads_it(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert named(tmp_path / "loop") == (tmp_path / "loop", None)
    assert named("a\0b") == (Path("a\0b"), None)


def test_a_best_checkpoint_of_no_run_names_a_folder_like_any_other(tmp_path):
    for path in (tmp_path / "typo" / "checkpoints" / "best", tmp_path / "checkpoints" / ("x" * 300)):
        assert named(path) == (path, None)


def test_a_best_checkpoint_that_is_not_there_is_told(folder):
    shutil.rmtree(checkpoint_path(folder, 3))
    with pytest.raises(InputError, match=r"checkpoints/best: the checkpoint of step 3, the best, is not there"):
        run_of(folder.checkpoints / "best")
    note_best(folder, -1)
    with pytest.raises(InputError, match=r"checkpoints/best: it is not known which checkpoint is the best"):
        run_of(folder.checkpoints / "best")
    newest = checkpoint_path(folder, 7)
    update_state(newest, msgspec.structs.replace(open_checkpoint(newest).state, evaluation=None))
    with pytest.raises(InputError, match=r"checkpoints/best: nothing was evaluated yet"):
        run_of(folder.checkpoints / "best")
