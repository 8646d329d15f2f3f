import json
import platform
import subprocess
from datetime import datetime

import pytest
import torch

from megdet.errors import InputError
from megdet.run_folder.environment import collect_environment, git_state
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.sessions import read_environment, write_environment


def git(folder, *arguments):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_session_says_where_it_ran():
    session = json.loads(json.dumps(collect_environment(world_size=3, device="cpu"), allow_nan=False))
    assert session["world_size"] == 3
    assert session["device"] == "cpu"
    assert session["devices"] == []
    assert session["cpu"]["cores"] >= 1
    assert session["cpu"]["memory_bytes"] > 2**28
    assert session["cpu"]["model"]
    assert session["versions"]["python"] == platform.python_version()
    assert session["versions"]["torch"] == torch.__version__
    assert set(session["versions"]) >= {"megdet", "torchvision", "timm", "cuda", "nccl"}
    assert datetime.fromisoformat(session["started_utc"]).utcoffset().total_seconds() == 0
    assert session["command"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_session_on_a_gpu_names_it():
    session = collect_environment(world_size=1, device="cuda")
    assert session["devices"][0]["name"] == torch.cuda.get_device_name(0)
    assert session["devices"][0]["memory_bytes"] > 2**30
    assert session["versions"]["nccl"]


def test_every_start_appends_a_session(tmp_path):
    folder = RunFolder(tmp_path).create()
    write_environment(folder, collect_environment(world_size=1, device="cpu"))
    write_environment(folder, collect_environment(world_size=2, device="cpu"))
    assert [session["world_size"] for session in read_environment(folder)] == [1, 2]


def test_an_environment_of_another_format_is_refused_and_kept(tmp_path):
    folder = RunFolder(tmp_path).create()
    folder.environment.write_text("[]")
    with pytest.raises(InputError, match=r"environment\.json: expected object, got array.*remove the file"):
        write_environment(folder, {})
    assert folder.environment.read_text() == "[]"


def test_the_commit_is_noted_and_dirty_only_when_a_tracked_file_is_changed(tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_DIR", raising=False)
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    (tmp_path / "untracked").write_text("")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_outside_of_a_repository_or_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None
