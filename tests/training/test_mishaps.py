"""What happens to a machine while a run goes on: its folder becomes read-only, its clock is set."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megdet.cli.main import main
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe
from megdet.run_folder.checkpoint_files import checkpoints, latest_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.training import run as run_module
from megdet.training import step_log
from megdet.training.loop import train
from megdet.training.run import RunOptions
from run_folders import load_checkpoint
from small_runs import ALONE, three_epochs


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    return three_epochs(tmp_path_factory.mktemp("data"))


@pytest.fixture
def protect() -> Iterator[Any]:
    """Makes folders read-only, for the administrator too; they can be changed again after the test."""
    folders: list[Path] = []

    def make_read_only(folder: Path) -> None:
        folders.append(folder)
        if os.geteuid():
            folder.chmod(0o500)
        else:
            subprocess.run(["chattr", "+i", str(folder)], check=True)

    yield make_read_only
    for folder in folders:
        if os.geteuid():
            folder.chmod(0o700)
        else:
            subprocess.run(["chattr", "-i", str(folder)], check=True)


@pytest.fixture
def can_protect(protect: Any, tmp_path: Path) -> Any:
    try:
        (tmp_path / "probe").mkdir()
        protect(tmp_path / "probe")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this file system has no files that the administrator cannot change")
    return protect


def test_a_run_folder_that_becomes_read_only_is_one_line_and_the_checkpoint_before_is_kept(
    recipe, tmp_path, monkeypatch, capsys, can_protect
):
    make, folder, done = run_module.train_step, RunFolder(tmp_path / "run"), []

    def protecting(*arguments: Any) -> Any:
        done.append(arguments[4])
        if arguments[4] == 3:
            can_protect(folder.checkpoints)
        return make(*arguments)

    monkeypatch.setattr(run_module, "train_step", protecting)
    monkeypatch.setattr(step_log, "READ_SECONDS", 0.0)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--run", str(folder.path), "--workers", "0"]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == (
        f"megdet: the run folder {folder.path} was made read-only while the run went on: let this user write there and "
        "run the same command again"
    )
    assert "Traceback" not in said
    assert done == [0, 1, 2, 3]
    assert [path.name for path in checkpoints(folder)] == ["step_00000002"]


def test_a_clock_that_is_set_back_or_forth_changes_nothing(recipe, tmp_path, monkeypatch):
    def end_of(name: str) -> dict[str, torch.Tensor]:
        folder = RunFolder(tmp_path / name)
        train(recipe, folder, RunOptions(workers=1), ALONE)
        found = latest_checkpoint(folder)
        assert found is not None
        tensors, _ = load_checkpoint(found)
        return {f"{kind}.{key}": tensor for kind, own in tensors.items() for key, tensor in own.items()}

    plain, now = end_of("plain"), time.time
    jumps = iter([0, -86_400, 1e6] * 10_000)
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    moved = end_of("moved")
    assert all(torch.equal(tensor, moved[name]) for name, tensor in plain.items())
