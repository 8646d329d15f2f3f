"""`--fold` of `megdet evaluate` and `megdet detect`, on a run that was evaluated in the background."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli_runs import TinyData, make_data, train_exactly
from megdet.cli.main import main

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["--evaluate-in-background", "--evaluate-on", "cpu", "--device", "cpu"]
    return train_exactly(data, tmp_path_factory.mktemp("runs") / "a", *words)


def detections(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text())
    assert len(found) > 10
    return found


def assert_same_but_for_rounding(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert one["bbox"] == pytest.approx(other["bbox"], abs=2e-3)
        assert one["score"] == pytest.approx(other["score"], abs=2e-6)


def num_folded(printed: str) -> int:
    found = re.search(r"^(\d+) batch norms folded", printed, re.MULTILINE)
    assert found is not None, printed
    return int(found[1])


def test_evaluate_finds_what_the_background_found(run: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(run), "--workers", "0", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "detections.json").read_bytes() == (run / "detections.json").read_bytes()
    assert (tmp_path / "evaluation.json").read_bytes() == (run / "evaluation.json").read_bytes()


def test_a_folded_evaluation_goes_beside_that_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["evaluate", str(run), "--fold", "--workers", "0", "--device", "cpu"]) == 0
    assert num_folded(capsys.readouterr().out) > 5
    found = detections(run / "evaluations/val-folded/detections.json")
    assert_same_but_for_rounding(found, detections(run / "detections.json"))
    assert {path: path.read_bytes() for path in before} == before


def test_a_folded_detector_draws_the_same(
    run: Path, data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["detect", str(run), str(data.val_images), "--device", "cpu", "--score", "0.9"]
    assert main([*words, "--out", str(tmp_path / "plain")]) == 0
    assert "norms folded" not in capsys.readouterr().out
    assert main([*words, "--fold", "--out", str(tmp_path / "folded")]) == 0
    assert num_folded(capsys.readouterr().out) > 5
    plain, folded = (detections(tmp_path / name / "detections.json") for name in ("plain", "folded"))
    assert_same_but_for_rounding(folded, plain)


def test_statistics_estimated_anew_are_folded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(run), "--precise-bn", "8", "--workers", "0", "--device", "cpu"]
    assert main(words) == 0
    assert main([*words, "--fold"]) == 0
    assert num_folded(capsys.readouterr().out) > 5
    plain, folded = (run / f"evaluations/val-precise-bn-8{name}/detections.json" for name in ("", "-folded"))
    assert_same_but_for_rounding(detections(folded), detections(plain))


def test_files_of_detections_cannot_be_folded(run: Path, refused: Refused) -> None:
    files = ["--ground-truth", run / "a.json", "--detections", run / "detections.json"]
    assert "--fold needs the detector of a RUN" in refused("evaluate", *files, "--fold")


def test_a_device_for_evaluations_is_refused_without_the_background(
    data: TinyData, tmp_path: Path, refused: Refused
) -> None:
    line = refused("train", "demo", "--run", tmp_path / "run", *data.options, "--evaluate-on", "cpu")
    assert "--evaluate-on cpu is for --evaluate-in-background: give both or neither" in line
    assert not (tmp_path / "run").exists()
