"""Whole commands on images at an address: the same weights and detections as from a local folder, to the bit."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_runs import OVERRIDES, TinyData, make_data
from far_servers import FarServer, far_server, zip_of
from megdet.cli.main import main
from megdet.data.far import reading
from megdet.run_folder.checkpoint_files import checkpoint_step, checkpoints
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.ledger import Evaluated, Steps, read_chain

SMALL = [
    *OVERRIDES,
    *("--model.backbone.name", "test_resnet", "--model.box_head.score_threshold", "0.0"),
    *("--checkpoint_steps", "1", "--keep_checkpoints", "9", "--precision", "float32"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def server(data: TinyData) -> Iterator[FarServer]:
    """Every seventh request fails."""
    kinds = (503, "reset", "short")
    with far_server(data.folder) as running, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_FIRST_PAUSE", 0.001)
        running.fault_of = lambda number: None if number % 7 else kinds[number % 3]
        yield running


def train(data: TinyData, folder: Path, train_images: str, val_images: str) -> RunFolder:
    images = ["--data.train_images", train_images, "--data.val_images", val_images]
    cache = ["--data.cache_folder", str(folder.parent / "cache")]
    assert main(["train", "demo", "--run", str(folder), *data.options, *SMALL, *images, *cache]) == 0
    return RunFolder(folder)


@pytest.fixture(scope="module")
def local(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("local") / "run"
    return train(data, folder, str(data.train_images), str(data.val_images))


def results(run: RunFolder) -> tuple[object, ...]:
    """Digests of all state at the end, of the training images, and of the detections."""
    entries = read_chain(run.ledger).entries
    state = [entry.state for entry in entries if isinstance(entry, Steps)][-1]
    detections = [entry.detections for entry in entries if isinstance(entry, Evaluated)][-1]
    return state, detections, json.loads(run.image_digests.read_text()), run.detections.read_bytes()


def test_a_training_from_a_web_server_that_fails_has_the_weights_of_a_local_one(tmp_path, data, local, server):
    run = train(data, tmp_path / "run", f"{server.address}/train", f"{server.address}/val")
    assert results(run) == results(local)
    assert [*(tmp_path / "cache/files").rglob("*.copy")]


def test_a_run_that_began_in_a_local_folder_goes_on_from_a_zip_and_ends_with_the_same_weights(tmp_path, data, local):
    shutil.copytree(local.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    for checkpoint in checkpoints(run):
        if checkpoint_step(checkpoint) > 1:
            shutil.rmtree(checkpoint)
    run.detections.unlink()
    zips = [zip_of(getattr(data, f"{split}_images"), tmp_path / f"{split}.zip", "in") for split in ("train", "val")]
    assert results(train(data, run.path, *zips)) == results(local)
    assert not (tmp_path / "cache").exists()  # an archive on a disk is not copied


def test_evaluate_and_detect_take_addresses(tmp_path, data, local, server, capsys):
    words = ["--data", str(data.val), f"{server.address}/val", "--out", str(tmp_path / "out"), "--workers", "0"]
    assert main(["evaluate", str(local.path), *words]) == 0
    assert (tmp_path / "out/detections.json").read_bytes() == local.detections.read_bytes()
    name = sorted(file.name for file in data.val_images.iterdir())[0]
    address = zip_of(data.val_images, tmp_path / "val.zip")
    out = ["--out", str(tmp_path / "drawn"), "--json"]
    capsys.readouterr()
    assert main(["detect", str(local.path), f"{server.address}/val/{name}", address, *out]) == 0
    pictures = json.loads(capsys.readouterr().out)["images"]
    assert len(pictures) == 5
    far, zipped = (pictures[place]["detections"] for place in (0, 1))  # of one name, so their ids are their addresses
    assert {row.pop("image_id") for row in far} == {f"{server.address}/val/{name}"}
    assert {row.pop("image_id") for row in zipped} == {f"zip://{name}::{address.rpartition('::')[2]}"}
    assert far == zipped
    assert len({Path(own["picture"]).name for own in pictures}) == 5
    assert main(["detect", str(local.path), f"{server.address}/val"]) == 2
    assert "a web server does not say which files it has: name each image" in capsys.readouterr().err


def test_check_stats_and_a_new_recipe_take_addresses(tmp_path, data, server, capsys):
    images = f"{server.address}/train"
    told = []
    for place in (str(data.train_images), images):
        assert main(["data", "check", str(data.train), place, "--json"]) == 0
        assert main(["data", "stats", str(data.train), place, "--json"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    recipe = tmp_path / "new.yaml"
    assert main(["recipes", "new", str(recipe), "--data", str(data.train), images]) == 0
    assert f"train_images: {images}\n" in recipe.read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["data", "convert", "--from", "yolo", "{0}", "{0}/out", "--images", "s3://bucket/x"],
        ["data", "convert", "--from", "coco", "--to", "yolo", "{1}", "{0}/out", "--images", "s3://bucket/x"],
        ["data", "merge", "{0}/out", "--data", "{1}", "s3://bucket/x"],
    ],
)
def test_what_writes_links_to_images_needs_them_here(tmp_path, data, words, capsys):
    assert main([word.format(tmp_path, data.train) for word in words]) == 2
    line = capsys.readouterr().err.strip()
    assert "s3://bucket/x: data " in line
    assert line.endswith("needs a folder on this machine: fetch the images and give their folder")
