"""The verb `reproduce`: what it refuses, and what it prints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megdet.cli import reproduction
from megdet.cli.main import main
from megdet.paper.report import Report

Refused = Callable[..., str]


def test_items_and_scales_that_do_not_exist_are_named(refused: Refused) -> None:
    assert "invalid choice: 'table9' (choose from" in refused("reproduce", "table9")
    assert "argument --scale: invalid choice: 'imagenet'" in refused("reproduce", "table2", "--scale", "imagenet")
    assert "unknown option '--model.fpn.chanels'" in refused("reproduce", "claim-bn-size", "--model.fpn.chanels", "8")
    assert "no row 'b1-bn1'; there are b16-bn0" in refused("reproduce", "table2", "--rows", "b1-bn1")
    assert "--rows is for table2 and table3" in refused("reproduce", "figure4", "--rows", "b16-bn0")
    assert "--run is empty" in refused("reproduce", "table2", "--run", "")


def test_missing_data_and_weights_are_named_before_any_work(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "data/bccd/annotations/trainval.json: no such file" in refused("reproduce", "table3", "--scale", "bccd")
    assert "unpack the images and annotations of COCO 2017" in refused("reproduce", "table3", "--scale", "coco")
    assert "--weights none.pth: no such file" in refused("reproduce", "table3", "--weights", "none.pth")
    for name in ("annotations/trainval.json", "annotations/test.json", "images/a.jpg"):
        file = tmp_path / "data/bccd" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert "name a file of MobileNetV2 with --weights" in refused("reproduce", "table3", "--scale", "bccd")
    assert not (tmp_path / "runs").exists()


def test_the_report_is_printed_as_a_table_or_as_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report("table2", "demo", ("row", "mmAP, here"), [["b16-bn0", "30.0"]], [{"mmap": 30.0}], ["A note."])
    monkeypatch.setattr(reproduction, "reproduce", lambda *_, **__: report)
    assert main(["reproduce", "table2", "--run", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("b16-bn0", "30.0", "A note.", f"{tmp_path / 'table2.md'}"))
    assert main(["reproduce", "table2", "--run", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [{"mmap": 30.0}]
