"""Names and folders that somebody else chose: what cannot be shown, what is no text, links that lie in the way."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_runs import OVERRIDES, TinyData, make_data
from megdet.cli.main import main

Refused = Callable[..., str]
BAD = os.fsdecode(b"caf\xe9\x1b[2J\xe2\x80\xae")
"""A byte that is not UTF-8, an escape sequence, a mark that turns the direction of writing."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in a folder whose name is no text, with data there too."""
    folder = tmp_path_factory.mktemp("runs")
    images = Path(shutil.copytree(data.train_images, folder / BAD / "images"))
    options = [*data.options, "--data.train_images", str(images), *OVERRIDES]
    assert main(["train", "demo", "--run", str(folder / BAD / "run"), *options]) == 0
    return folder / BAD / "run"


def test_a_run_folder_whose_name_is_no_text_trains_goes_on_and_evaluates(run: Path, data: TinyData) -> None:
    assert (run / "pictures/detections.png").is_file()
    recipe = run / "recipe.yaml"
    assert main(["train", str(recipe), "--run", str(run), "--workers", "0"]) == 0
    assert main(["evaluate", str(run)]) == 0
    started = [session["command"] for session in json.loads((run / "environment.json").read_text())["sessions"]]
    assert len(started) == 2


def test_detecting_in_a_folder_of_names_that_are_no_text_writes_its_json(
    run: Path, data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next(data.val_images.iterdir())
    (tmp_path / "in").mkdir()
    shutil.copy(image, tmp_path / "in" / f"{BAD}.jpg")
    command = [
        "detect",
        str(run),
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
        "--model.box_head.score_threshold",
        "0",
    ]
    assert main(command) == 0
    found = json.loads((tmp_path / "out/detections.json").read_bytes().decode("utf-8", errors="strict"))
    assert {row["image_id"] for row in found} == {"caf\\udce9\x1b[2J\u202e.jpg"}
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    printed = capsys.readouterr().out
    assert "caf\\udce9\\u001b[2J\\u202e.png" in printed
    assert printed.replace("\n", "").isprintable()


def test_detect_spares_what_links_in_its_folder_point_to(
    run: Path, data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next(data.val_images.iterdir())
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.write_text("mine")
    out.mkdir()
    picture = out / f"{image.stem}.png"
    for name in (picture.name, "detections.json"):
        (out / name).symlink_to(precious)
    for name, why in (("detections.json", "which is not of detect"), (picture.name, "which detect did not draw")):
        assert main(["detect", str(run), str(image), "--out", str(out)]) == 2
        assert f"{out / name} would be replaced, {why}" in " ".join(capsys.readouterr().err.split())
        (out / name).unlink()
    assert main(["detect", str(run), str(image), "--out", str(out)]) == 0
    assert precious.read_text() == "mine"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_name_as_long_as_the_system_allows_is_drawn(run: Path, data: TinyData, tmp_path: Path) -> None:
    shutil.copy(next(data.val_images.iterdir()), tmp_path / f"{'x' * 250}.jpeg")
    assert main(["detect", str(run), str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    "words",
    [
        ("train", "x" * 300),
        ("train", "demo", "--run", "x" * 300),
        ("evaluate", "x" * 300),
        ("detect", "x" * 300, __file__),
        ("evaluate", "--ground-truth", "x" * 300, "--detections", "x"),
        ("data", "check", "x" * 300, "."),
        ("train", "demo", "--data.train_annotations", f"{'x' * 300}.json", "--data.draw_demo", ""),
        ("train", "demo", "--model.backbone.weights", "x" * 5000),
        ("recipes", "x" * 300),
        ("import", "torchvision", "x" * 300, "--run", "a"),
        ("data", "convert", "--from", "voc", "x" * 300, "out"),
    ],
)
def test_a_name_that_no_file_can_have_is_refused(words: tuple[str, ...], refused: Refused) -> None:
    line = refused(*words)
    assert "xxx" in line
    assert len(line) < 620


def test_no_id_and_no_name_of_a_file_can_pose_as_a_line_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = "a\nfit to train on"
    row = {"id": forged, "file_name": f"{forged}.jpg"}
    document = {"images": [row, row], "annotations": [], "categories": [{"id": 1, "name": forged}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert main(["data", "check", str(tmp_path / "a.json"), str(tmp_path)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert sum("fit to train on" in line for line in lines) >= 3
    assert not any(line.startswith("fit to train on") for line in lines)


def test_a_class_that_the_terminal_cannot_show_is_printed_by_its_number(tmp_path: Path) -> None:
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}
    truth = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "\u732b"}], "annotations": [box]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text("[]")
    command = [sys.executable, "-m", "megdet", "evaluate", "--ground-truth", "truth.json"]
    done = subprocess.run(
        [*command, "--detections", "found.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u732b" in done.stdout
