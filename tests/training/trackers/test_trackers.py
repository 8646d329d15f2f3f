"""Trackers, offline: what each library keeps is read back; a failing one stops nothing."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.run_folder.folder import RunFolder
from megdet.training.trackers import trackers
from megdet.training.trackers.feed import Feed
from megdet.training.trackers.trackers import Trackers, check_trackers

_TWO_STARTS = """
import sys
from dataclasses import replace
from pathlib import Path
from PIL import Image
from megdet.recipe import Recipe
from megdet.run_folder.folder import RunFolder
from megdet.training.trackers.trackers import Trackers, send_files
recipe, folder = replace(Recipe(), seed=7, trackers=(sys.argv[1],)), RunFolder("run").create()
Image.new("RGB", (8, 8)).save(folder.pictures / "course.png")
folder.report.write_text("<p>report")
def line(step):
    return {"step": step, "loss": 1.0 / step, "left_out": "why", "noise": {"backbone": {"variance": 2.0}}}
with Trackers(recipe, folder, 0, print) as own:
    own.steps([line(1), line(2), line(3)])
    own.evaluated(2, {"bbox": {"AP": 0.5}})
with Trackers(recipe, folder, 1, print) as own:  # it was killed and goes on from step 1
    own.steps([line(2), line(3), line(4)])
    own.evaluated(2, {"bbox": {"AP": 0.5}})
    own.evaluated(4, {"bbox": {"AP": 0.75}})
send_files(recipe, folder, [folder.pictures / "course.png"], [folder.report], print)
"""
LOSSES = {1: 1.0, 2: 0.5, 3: 1 / 3, 4: 0.25}


def two_starts(name: str, folder: Path, **environment: str) -> str:
    """Run it in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", _TWO_STARTS, name],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"tracked by {name}") == 2
    assert "Warning" not in done.stdout
    strangers = [line for line in done.stdout.splitlines() if not line.startswith("tracked by")]
    assert strangers == [], "a tracker printed where results are"
    sent = json.loads((folder / "run/trackers.json").read_text())[name]
    assert (sent["steps"], sent["evaluated"]) == (4, 4)
    return sent["identity"]


@pytest.mark.slow
def test_tensorboard_has_every_step_once_and_the_picture(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_starts("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert {one.step: one.value for one in events.Scalars("train/loss")} == pytest.approx(LOSSES)
    assert len(events.Scalars("train/loss")) == 4
    assert [one.value for one in events.Scalars("evaluation/bbox/AP")] == [0.5, 0.75]
    assert events.Tags()["images"] == ["pictures/course"]
    assert (tmp_path / "run/tensorboard/report.html").read_text() == "<p>report"


@pytest.mark.slow
def test_mlflow_has_every_step_once_the_recipe_and_the_files(tmp_path: Path) -> None:
    store = tmp_path / "mlruns"
    two_starts("mlflow", tmp_path, MLFLOW_TRACKING_URI=store.as_uri(), MLFLOW_ALLOW_FILE_STORE="true")
    runs = [path for path in store.glob("*/*") if (path / "params").is_dir()]
    assert len(runs) == 1
    rows = [row.split() for row in (runs[0] / "metrics/train/loss").read_text().splitlines()]
    assert len(rows) == 4
    assert {int(step): float(value) for _, value, step in rows} == pytest.approx(LOSSES)
    assert (runs[0] / "params/seed").read_text() == "7"
    assert (runs[0] / "params/optimizer.base_lr").read_text() == "0.02"
    assert len((runs[0] / "metrics/evaluation/bbox/AP").read_text().splitlines()) == 2
    assert (runs[0] / "artifacts/pictures/course/course.png").is_file()
    assert (runs[0] / "artifacts/report.html").is_file()


@pytest.mark.slow
def test_trackio_has_every_step_once_and_the_recipe(tmp_path: Path) -> None:
    name = two_starts("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio/megdet.db") as base:
        rows = base.execute("select step, metrics from metrics where run_name = ? order by id", [name]).fetchall()
    found = [(step, json.loads(metrics)) for step, metrics in rows]
    losses = {step: metrics["train/loss"] for step, metrics in found if "train/loss" in metrics}
    assert losses == pytest.approx(LOSSES)
    assert sum("train/loss" in metrics for _, metrics in found) == 4
    assert [own["evaluation/bbox/AP"] for _, own in found if "evaluation/bbox/AP" in own] == [0.5, 0.75]
    assert any("pictures/course" in metrics for _, metrics in found)


@pytest.mark.slow
def test_wandb_offline_goes_on_in_the_same_run(tmp_path: Path) -> None:
    identity = two_starts("wandb", tmp_path, WANDB_MODE="offline")
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 3  # a file a start, and one of the pictures
    assert {file.stem.removeprefix("run-") for file in files} == {identity}
    content = b"".join(file.read_bytes() for file in files)
    assert content.count(b"train/noise/backbone/variance") >= 4
    assert list((tmp_path / "run/wandb").glob("*/files/media/images/pictures/course*.png"))


class _Broken:
    """A tracker whose second call fails; it says what it got."""

    identity, place, forgets_later_steps = "1", "nowhere", False

    def __init__(self) -> None:
        self.got: list[int] = []
        self.failed = threading.Event()

    def log(self, step, numbers) -> None:  # noqa: ARG002  # as a tracker's
        self.got.append(step)
        if len(self.got) == 2:
            self.failed.set()
            raise ConnectionError("no network")

    def picture(self, name, file) -> None:
        raise NotImplementedError

    def attach(self, file) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise AssertionError("it had failed")


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(monkeypatch, tmp_path: Path) -> None:
    broken, said = _Broken(), []
    monkeypatch.setitem(trackers._OPENERS, "wandb", lambda _: broken)
    monkeypatch.setattr(trackers, "_SECONDS_BETWEEN_SENDINGS", 0.0)
    folder = RunFolder(tmp_path / "run").create()
    with Trackers(replace(Recipe(), trackers=("wandb",)), folder, 0, said.append) as own:
        own.steps([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}])
        assert broken.failed.wait(60)
        own._feeds[0]._thread.join(60)
        for step in range(3, 9):
            own.steps([{"step": step, "loss": 1.0}])
    assert broken.got == [1, 2]
    warnings = [sentence for sentence in said if sentence.startswith("Warning")]
    assert warnings == ["Warning: tracker wandb is given up, the run goes on without it: ConnectionError: no network"]


def test_a_tracker_that_hangs_is_left_behind() -> None:
    release = threading.Event()
    feed = Feed("slow", _Broken())  # type: ignore[arg-type]  # it has what a feed calls
    feed.give(lambda: release.wait(60) and None)
    feed.end(0.05)
    assert feed.failure == "it has not taken everything after 0 s"
    release.set()


def test_a_tracker_that_does_not_open_and_one_that_is_not_installed_are_refused(monkeypatch, tmp_path: Path) -> None:
    def refuse(opening):
        raise ValueError("no API key")

    monkeypatch.setitem(trackers._OPENERS, "wandb", refuse)
    with pytest.raises(InputError, match="trackers: wandb cannot be opened: ValueError: no API key"):
        Trackers(replace(Recipe(), trackers=("wandb",)), RunFolder(tmp_path).create(), 0, print)
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"mlflow is not installed: uv pip install 'megdet\[mlflow\]'"):
        check_trackers(["mlflow"])


def test_the_run_that_a_tracker_began_is_gone_on_with_after_the_next_was_refused(monkeypatch, tmp_path: Path) -> None:
    class Idle(_Broken):
        identity = "begun"

        def close(self) -> None:
            pass

    def refuse(opening):
        raise ValueError("no API key")

    earlier = []
    monkeypatch.setitem(trackers._OPENERS, "trackio", lambda own: earlier.append(own.identity) or Idle())
    monkeypatch.setitem(trackers._OPENERS, "wandb", refuse)
    for _ in range(2):
        with pytest.raises(InputError, match="wandb cannot be opened"):
            Trackers(replace(Recipe(), trackers=("trackio", "wandb")), RunFolder(tmp_path).create(), 0, print)
    assert earlier == ["", "begun"]
