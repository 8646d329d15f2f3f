"""From a run to a file, its proof and its card; the graph itself is another test's."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from exported_file import write_fixed_file
from megdet.cli.main import main
from megdet.export import exporting
from megdet.export.proof import prove
from megdet.export.quantized import Cost, Quantized
from megdet.inference.trained import load_detector
from megdet.run_folder.folder import RunFolder
from megdet.structures import BatchDetections
from small_runs import CPU, save_run, small_recipe, write_small_sets


@pytest.fixture
def run(tmp_path):
    """A run whose detector finds nothing."""
    recipe = small_recipe(write_small_sets(tmp_path / "data"))
    head = replace(recipe.model.box_head, score_threshold=1.0)
    folder, _ = save_run(tmp_path / "run", replace(recipe, model=replace(recipe.model, box_head=head)))
    return folder


BOX = np.array([[8, 8, 24, 24]], np.float32)


def write(path, trained, boxes, scores, labels, masks=None):
    return write_fixed_file(path, boxes, scores, labels, masks, trained.recipe, exporting_text(trained))


def exporting_text(trained):
    return exporting.described(trained, "0" * 64, "0").text()


def pretend_graph(monkeypatch, boxes, label):
    """Whatever is exported finds these boxes, or for a label of -1 nothing."""

    def write_graph(trained, description, kind, path):
        scores, labels = np.full(len(boxes), 0.9, np.float32), np.full(len(boxes), label)
        write_fixed_file(path, boxes, scores, labels, None, trained.recipe, description.text())

    monkeypatch.setattr(exporting, "write_graph", write_graph)


def test_a_file_that_finds_the_same_has_its_proof_and_its_card_beside_it(run, monkeypatch, capsys):
    pretend_graph(monkeypatch, BOX, -1)
    assert main(["export", str(run.path)]) == 0
    folder = run.path / "export"
    assert sorted(path.name for path in folder.iterdir()) == ["run.onnx", "run.onnx.md", "run.onnx.proof.json"]
    proof = json.loads((folder / "run.onnx.proof.json").read_text())
    assert proof["holds"]
    assert [look["name"] for look in proof["looks"]] == ["batch 1", "batch 2", "batch 8", "files"]
    assert "5 validation images" in capsys.readouterr().out


def truth_of(folder):
    """Every image has the same object, so that a fixed graph can be right."""
    file = folder.path.parent / "data" / "val.json"
    truth = json.loads(file.read_text())
    x1, y1, x2, y2 = BOX[0].tolist()
    first = truth["annotations"][0]
    area = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "category_id": 10}
    truth["annotations"] = [
        {**first, **area, "id": number + 1, "image_id": image["id"], "segmentation": [[x1, y1, x2, y1, x2, y2]]}
        for number, image in enumerate(truth["images"])
    ]
    file.write_text(json.dumps(truth))


def test_a_file_that_finds_other_things_fails_and_is_kept_under_another_name(run, monkeypatch, capsys):
    sizes_of_files(run)
    truth_of(run)
    pretend_graph(monkeypatch, BOX, 0)  # all of the objects, where the detector finds nothing
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run.path), "--out", str(run.path / "a.onnx")])
    assert stop.value.code == 1
    assert not (run.path / "a.onnx").exists()
    assert json.loads((run.path / "a.failed.onnx.proof.json").read_text())["holds"] is False
    assert "does NOT hold" in (run.path / "a.failed.onnx.md").read_text()
    assert "The proof does not hold" in capsys.readouterr().out
    pretend_graph(monkeypatch, BOX, -1)
    assert main(["export", str(run.path), "--out", str(run.path / "a.onnx")]) == 0
    assert sorted(path.name for path in run.path.glob("a.*")) == ["a.onnx", "a.onnx.md", "a.onnx.proof.json"]


def pretend_int8(monkeypatch):
    """The same file as the one in floats, as if it computed with 8-bit integers."""

    def in_8_bits(trained, in_float, file, inputs, calibration):
        file.write_bytes(in_float.read_bytes())
        costs = Cost(4_000_000, 0.02), Cost(1_000_000, 0.01)
        return Quantized(calibration.method, len(inputs), 20, 4, len(inputs), *costs)

    monkeypatch.setattr(exporting, "_in_8_bits", in_8_bits)


def test_a_file_of_8_bit_integers_has_a_name_of_its_own_and_says_what_it_saves(run, monkeypatch, capsys):
    pretend_graph(monkeypatch, BOX, -1)
    pretend_int8(monkeypatch)
    asked = ["--int8", "--calibration", "entropy", "--calibration-images", "3"]
    assert main(["export", str(run.path), *asked]) == 0
    folder = run.path / "export"
    names = [f"run-int8.onnx{suffix}" for suffix in ("", ".md", ".proof.json")]
    assert sorted(path.name for path in folder.iterdir()) == names
    proof = json.loads((folder / "run-int8.onnx.proof.json").read_text())
    assert proof["allowed"] == 0.01
    assert (proof["int8"]["method"], proof["int8"]["images"]) == ("entropy", 3)
    assert "float32     4.0 MB    20.0 ms" in capsys.readouterr().out
    card = (folder / "run-int8.onnx.md").read_text()
    assert "20 layers compute with 8-bit integers" in card
    assert "| this file | 1.0 | 0.0100 |" in card


def test_a_file_of_8_bit_integers_that_finds_other_things_is_not_there_under_its_name(run, monkeypatch, capsys):
    sizes_of_files(run)
    truth_of(run)
    pretend_graph(monkeypatch, BOX, 0)
    pretend_int8(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run.path), "--int8"])
    assert stop.value.code == 1
    assert not (run.path / "export" / "run-int8.onnx").exists()
    words = " ".join(capsys.readouterr().out.split())
    assert "and may by 1. Do not use the file. Another --calibration" in words


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--int8", "--to", "torch-export"], "--int8 is for --to onnx"),
        (["--calibration", "minmax"], "are for --int8"),
        (["--int8", "--data.train_annotations", "gone.json"], "gone.json"),
    ],
)
def test_what_cannot_have_8_bit_integers_is_refused_before_work(run, capsys, words, why):
    assert main(["export", str(run.path), *words]) == 2
    assert why in capsys.readouterr().err


def test_a_name_of_another_kind_and_what_cannot_be_exported_are_refused_before_work(run, capsys):
    for words, why in (
        (["--out", "a.pt2"], "ends with .onnx"),
        (["--evaluation.flip", "true"], "evaluation.flip"),
    ):
        assert main(["export", str(run.path), *words]) == 2
        assert why in capsys.readouterr().err


def trained_that_finds(run, boxes):
    """The detector of a run, which finds these boxes of class 0 in every image, in pixels of the canvas."""
    trained = load_detector(run, CPU, {"precision": "float32"})
    found = torch.from_numpy(boxes)

    def detect(images, sizes):
        shape = len(sizes), len(found)
        labels = torch.zeros(shape, dtype=torch.int64)
        return BatchDetections(found.expand(len(sizes), -1, -1), torch.full(shape, 0.9), labels)

    trained.model.detect = detect
    return trained


def test_a_graph_that_was_changed_fails_the_proof(run, tmp_path):
    sizes_of_files(run)
    truth_of(run)
    trained = trained_that_finds(run, BOX)
    write_one = partial(write, trained=trained, scores=np.array([0.9], np.float32), labels=np.array([0]))
    proof = prove(trained, write_one(tmp_path / "same.onnx", boxes=BOX))
    assert proof.ours["bbox"] > 0.9
    assert proof.holds
    assert all(look.difference.unmatched == 0 and look.difference.box == 0 for look in proof.looks)
    moved = prove(trained, write_one(tmp_path / "moved.onnx", boxes=BOX + 1))
    assert not moved.holds
    assert moved.looks[0].difference.box == pytest.approx(1)
    assert prove(trained, tmp_path / "same.onnx", images=2).images == 2


def sizes_of_files(run: RunFolder) -> None:
    """Make the canvas have the pixels of the files: every image is 64 x 64, and so is the recipe's shorter edge."""
    data = run.path.parent / "data"
    truth = json.loads((data / "val.json").read_text())
    for image in truth["images"]:
        Image.new("RGB", (64, 64), (90, 90, 90)).save(data / "val" / image["file_name"])
        image.update(width=64, height=64)
    (data / "val.json").write_text(json.dumps(truth))
