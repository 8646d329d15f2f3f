"""`megdet evaluate RUN --precise-bn IMAGES`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_runs import make_data, train_exactly
from megdet.cli.main import main
from rank_runs import run_ranks

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_exactly(make_data(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("runs") / "a")


def test_the_numbers_go_beside_those_of_the_run_and_the_checkpoint_stays(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["evaluate", str(run), "--precise-bn", "10", "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    folder = run / "evaluations/val-precise-bn-10"
    assert "batch-norm statistics of 16 training images in 4 groups of 4" in printed
    assert str(folder / "evaluation.json") in printed
    assert "mmAP" in printed
    assert "AP50" in json.loads((folder / "evaluation.json").read_text())["bbox"]
    assert (folder / "detections.json").read_bytes() != (run / "detections.json").read_bytes()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.distributed
def test_two_ranks_detect_the_same_with_statistics_estimated_anew(run: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(run), "--precise-bn", "16", "--workers", "0", "--out", str(tmp_path / "one")]) == 0
    words = ["evaluate", run, "--precise-bn", "16", "--workers", "0", "--lane-width", "2", "--out", tmp_path / "two"]
    for ended in run_ranks(words, 2, tmp_path):
        assert ended.code == 0, ended.errors
    assert (tmp_path / "two/detections.json").read_bytes() == (tmp_path / "one/detections.json").read_bytes()


@pytest.mark.parametrize(("images", "word"), [("0", "at least 1 image"), ("-3", "not a whole number")])
def test_no_image_is_refused(images: str, word: str, run: Path, refused: Refused) -> None:
    assert word in refused("evaluate", run, f"--precise-bn={images}")


def test_a_run_without_statistics_is_refused(run: Path, refused: Refused) -> None:
    line = refused("evaluate", run, "--precise-bn", 8, "--bn_size", 0, "--model.fpn.norm", "none")
    assert "no statistics to estimate: bn_size is 0" in line


def test_files_of_detections_have_no_statistics(run: Path, refused: Refused) -> None:
    files = ["--ground-truth", run / "a.json", "--detections", run / "detections.json"]
    assert "--precise-bn needs the detector of a RUN" in refused("evaluate", *files, "--precise-bn", 8)


def test_missing_training_data_are_refused(run: Path, tmp_path: Path, refused: Refused) -> None:
    gone = ["--data.train_annotations", tmp_path / "gone.json"]
    assert "gone.json" in refused("evaluate", run, "--precise-bn", 8, *gone)


def test_a_forced_layout_without_statistics_to_estimate_is_refused(run: Path, refused: Refused) -> None:
    assert "--precise-bn" in refused("evaluate", run, "--lane-width", 1)
