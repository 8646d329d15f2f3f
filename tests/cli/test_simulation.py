"""`megdet simulate` as its user sees it."""

import json
from pathlib import Path

import pytest

from megdet.cli.main import main

KEYS = {"batch_size", "bn_size", "devices", "policy", "paper_hours", "predicted_hours", "calibrated"}


def test_the_json_has_every_row_of_the_paper_that_has_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--paper", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 23
    assert all(set(row) >= KEYS for row in rows)
    assert {row["policy"] for row in rows} == {"normal", "long"}
    assert sum(row["calibrated"] for row in rows) == 2
    assert [row["paper_hours"] for row in rows if row["rate"] == "half"] == [7.5]
    errors = [abs(row["predicted_hours"] / row["paper_hours"] - 1) for row in rows]
    assert sum(error < 0.2 for error in errors) >= 20
    assert all(row["plain_rule_hours"] == pytest.approx(row["paper_hours"]) for row in rows if row["calibrated"])


def test_the_json_of_the_scaling_has_both_speeds_or_the_one_that_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--device", "h100", "--json"]) == 0
    plain, tuned = json.loads(capsys.readouterr().out)["scaling"]["speeds"]
    assert (plain["name"], tuned["name"]) == ("plain", "tuned")
    assert all(a["hours"] > b["hours"] for a, b in zip(plain["points"], tuned["points"], strict=True))
    assert main(["simulate", "--device", "h100", "--overhead", "10", "--json"]) == 0
    [given] = json.loads(capsys.readouterr().out)["scaling"]["speeds"]
    assert (given["name"], given["fraction"], given["overhead_ms"]) == ("given", plain["fraction"], 10)


def test_published_speeds_are_printed_beside_their_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--published"]) == 0
    printed = capsys.readouterr().out
    assert "8 x V100 32GB" in printed
    assert "Mean error of the 13 speeds that set nothing: 7.8%, of the plain rule 13.5%" in printed
    assert main(["simulate", "--published", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["published"]
    assert len(rows) == 17
    assert sum(row["calibrates"] for row in rows) == 4


def test_the_paper_is_printed_with_what_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--paper"]) == 0
    printed = capsys.readouterr().out
    assert "256, BN 16, 128 GPUs" in printed
    assert "17 of the 20 trainings that set no constant are within 20%" in printed
    assert "hours = 1.74 + 27.46 epochs / GPUs" in printed
    assert printed.count("missed: ") == 3
    assert "other reading: " in printed


def test_scaling_is_printed_with_where_it_stops_paying(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "scaling.png"
    words = ["--device", "b200", "--images-per-device", "4", "--bn-size", "16", "--picture", str(picture)]
    assert main(["simulate", *words, "--noise-scale", "500", "--fraction", "0.3", "--overhead", "10"]) == 0
    printed = capsys.readouterr().out
    assert "B200, as given, 0.3 of its peak and 10 ms a micro-batch" in printed
    assert "it pays up to " in printed
    assert "1024" in printed
    assert "warmup only" not in printed
    assert main(["simulate"]) == 0
    printed = capsys.readouterr().out
    assert "46.8 ms a micro-batch: it pays up to 256 devices." in printed
    assert "36 ms a micro-batch: it pays up to 2 devices." in printed
    assert "Judged by time, memory and warmup only" in printed
    assert "32 on 1, 32 on 2 devices" in printed
    assert picture.stat().st_size > 10_000


def test_frozen_statistics_are_spread_in_large_micro_batches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--batch-size", "256", "--bn-size", "0"]) == 0
    printed = capsys.readouterr().out
    assert "1 x 2 x 128" in printed
    assert "a device's share is one micro-batch" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--paper", "--device", "h100"], "--device has no effect with --paper"),
        (["--published", "--device", "h100"], "--device has no effect with --published"),
        (["--published", "--paper"], "ask for one of them"),
        (["--published", "--picture", "x.png"], "--published has no picture"),
        (["--device", "h20"], "no device 'h20'; did you mean 'h200'?"),
        (["--batch-size", "64", "--images-per-device", "2"], "contradict"),
        (["--batch-size", "48"], "BN size 32 does not divide the batch of 48 images"),
        (["--fraction", "1.5"], "above 0 and at most 1"),
        (["--overhead", "-1"], "--overhead -1 must be at least 0"),
        (["--noise-scale", "nan"], "'nan' is not a number"),
        (["--picture", "x.movie"], "name it .png, .pdf or .svg"),
        (["--model.fpn.channels", "64"], "unknown option '--model.fpn.channels'"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
