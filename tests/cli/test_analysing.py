"""`megdet analyse variance`, `megdet analyse sampling` and `megdet lr-test` as a user calls them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_runs import OVERRIDES, TinyData, make_data
from megdet.cli.main import main
from megdet.run_folder.metrics import read_metrics

Refused = Callable[..., str]
TINY_OPTIONS = [*OVERRIDES, "--model.backbone.name", "test_resnet", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    sgd = ["--optimizer.kind", "sgd", "--optimizer.scaling", "linear"]
    assert main(["train", "demo", "--run", str(folder), *data.options, *TINY_OPTIONS, *sgd]) == 0
    return folder


def test_the_variance_of_a_run_is_printed_written_and_drawn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["analyse", "variance", str(run), "--batch", "2", "--factors", "2", "--images", "16", "--workers", "0"]
    folder = run.parent / "bn-2"
    words += ["--bn_size", "2", "--out", str(folder)]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["unit"], found["unit_images"], found["images"], found["step"]) == ("group", 2, 16, 3)
    assert [module["name"] for module in found["modules"]] == ["backbone", "fpn", "rpn", "box_head", "whole"]
    whole = found["modules"][-1]
    assert [level["batch"] for level in whole["levels"]] == [2, 4]
    assert whole["levels"][0]["variance"]["value"] > whole["levels"][1]["variance"]["value"] > 0
    assert {"signal", "noise", "scale", "is_resolved"} == set(whole["two_batches"]) == set(whole["direct"])
    assert found["overrides"] == {"bn_size": "2"}
    assert json.loads((folder / "variance.json").read_text()) == found
    assert {path.name for path in folder.iterdir()} == {"variance.json", "variance.png", "updates.png"}
    assert main(words) == 0
    printed = capsys.readouterr().out
    told = ("16 images, errors from 4 blocks, bn_size 2", "the run's own at step 3 was")
    for word in (
        "box head",
        "over the 1/N law",
        "large / small",
        "gradient noise scale",
        "share batch statistics",
        *told,
    ):
        assert word in printed


def test_too_few_images_for_a_variance_are_refused(run: Path, refused: Refused) -> None:
    line = refused("analyse", "variance", run, "--workers", 0)
    assert "4 disjoint mini-batches of 8 x 8 images take 256" in line
    assert "--batch and --images: they must be at least 1" in refused("analyse", "variance", run, "--batch", 0)


def test_the_variance_of_another_recipe_is_not_written_into_the_run(run: Path, refused: Refused) -> None:
    line = refused("analyse", "variance", run, "--bn_size", 2, "--seed=1")
    assert (
        "--bn_size, --seed: the measured recipe is not the run's own; name a folder for its results with --out" in line
    )
    assert not (run / "analysis/variance/variance.json").exists()


def test_table_one_of_runs_is_printed_and_their_proposals_are_drawn(
    run: Path, data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "b"
    assert main(["train", "demo", "--run", str(other), *data.options, *TINY_OPTIONS, "--batch_size", "12"]) == 0
    capsys.readouterr()
    words = ["analyse", "sampling", str(run), str(other), "--workers", "0"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["epoch"], row["batch_size"], row["steps"]) for row in found["rows"]] == [(1, 8, 3), (1, 12, 2)]
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert found["rows"][0]["roi_ratio"] == pytest.approx(sum(line["box_head_positive"] for line in lines) / 3)
    assert [len(images) for images in found["images"].values()] == [8, 12]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("sampling.json", "proposals-1.png", "proposals-2.png"),
    }
    assert main(words) == 0
    assert "RoIs (%)" in capsys.readouterr().out
    assert (run / "analysis/sampling/proposals.png").is_file()
    assert (other / "analysis/sampling/proposals.png").is_file()


def test_an_epoch_ends_with_a_line_of_its_ratios(run: Path) -> None:
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    [means] = [line["epoch_means"] for line in lines if "epoch_means" in line]
    assert (means["epoch"], means["steps"]) == (1, 3)
    assert means["rpn_positive_ratio"] == pytest.approx(sum(line["rpn_positive"] for line in steps) / 3 / 16)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, run: Path, refused: Refused) -> None:
    assert "not a run folder" in refused("analyse", "sampling", tmp_path)
    assert "a run is named twice" in refused("analyse", "sampling", run, f"{run}/")
    assert "not a run folder" in refused("analyse", "variance", tmp_path)
    assert "WHAT" in refused("analyse")


def test_a_rate_test_recommends_a_rate_of_the_recipes_own_key(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lr-test", "demo", *data.options, *TINY_OPTIONS, "--steps", "20", "--rates", "0.01", "--warmup", "0,2"]
    capsys.readouterr()
    assert main([*words, "--after", "2", "--out", str(tmp_path / "lr"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended_base_lr"] == pytest.approx(found["range_test"]["recommended"] * (16 / 8) ** 0.5)
    assert [(own["rate"], own["warmup_steps"], own["survives"]) for own in found["stability"]] == [
        (0.01, 0, True),
        (0.01, 2, True),
    ]
    assert {path.name for path in tmp_path.rglob("*")} == {"lr", "lr-test.json", "lr-test.png"}


def test_rates_that_are_no_numbers_are_refused(refused: Refused) -> None:
    assert "'fast' is not a list of rates" in refused("lr-test", "demo", "--rates", "fast")
    assert "--from 1 --to 0.1" in refused("lr-test", "demo", "--from", "1", "--to", "0.1")


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(run: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert "out cannot be written" in refused("lr-test", "demo", "--out", out)
    assert "out cannot be written" in refused("analyse", "variance", run, "--out", out)
    assert "out cannot be written" in refused("analyse", "sampling", run, "--out", out)
