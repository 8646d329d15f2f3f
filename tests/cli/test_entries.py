"""The verbs ensemble and submit as a user calls them."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cli_runs import TinyData, make_data, train_exactly
from megdet.cli.main import main
from megdet.evaluation.coco_numbers import evaluate_files
from megdet.files import read_json


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_exactly(data, tmp_path_factory.mktemp("run") / "a")


def run_verb(*words: object) -> int:
    return main([str(word) for word in words])


def test_a_run_alone_and_twice_is_an_ensemble_of_its_own_detections(run, data, tmp_path):
    found = read_json(run / "detections.json")
    assert run_verb("ensemble", run, run / "detections.json", "--out", tmp_path, "--method", "nms", "--iou", "0.9") == 0
    merged = read_json(tmp_path / "detections.json")
    assert sorted(json.dumps(row) for row in merged) == sorted(json.dumps(row) for row in found)
    numbers = read_json(tmp_path / "evaluation.json")
    assert numbers == evaluate_files(data.val, tmp_path / "detections.json").as_dict()
    assert run_verb("ensemble", run, run, run, "--out", tmp_path, "--method", "wbf", "--weights", "1,2,1") == 0
    fused = read_json(tmp_path / "detections.json")  # a cluster is three times the same
    assert len(fused) == len(merged)
    assert [row["score"] for row in fused] == pytest.approx([row["score"] for row in merged], abs=2e-6)


def test_annotations_may_be_named_and_without_any_there_are_no_numbers(run, data, tmp_path):
    file = tmp_path / "found.json"
    shutil.copy(run / "detections.json", file)
    assert run_verb("ensemble", file, file, "--out", tmp_path / "a") == 0
    assert not (tmp_path / "a" / "evaluation.json").exists()
    (tmp_path / "weights.json").write_text(json.dumps({read_json(data.val)["categories"][0]["name"]: [1, 0]}))
    words = ("--annotations", data.val, "--class-weights", tmp_path / "weights.json", "--most", 3)
    assert run_verb("ensemble", file, file, "--out", tmp_path / "b", *words) == 0
    assert (tmp_path / "b" / "evaluation.json").exists()
    assert 0 < len(read_json(tmp_path / "b" / "detections.json")) <= 12


def test_an_ensemble_refuses_in_one_line(run, data, tmp_path, refused):
    out = ("--out", tmp_path / "out")
    assert "there is no detections.json in this folder; `megdet evaluate" in refused("ensemble", tmp_path, *out)
    assert "no such file" in refused("ensemble", tmp_path / "none.json", *out)
    assert "1 weights for 2 members" in refused("ensemble", run, run, "--weights", "1", *out)
    assert "'x' is not a number" in refused("ensemble", run, run, "--weights", "1,x", *out)
    assert "'1.5' is not between 0 and 1" in refused("ensemble", run, "--iou", "1.5", *out)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "recipe.yaml").read_text().replace(str(data.val), str(data.train))
    (other / "recipe.yaml").write_text(text)
    line = refused("ensemble", run, other, *out)
    assert f"{other} is evaluated on {data.train}, {run} on {data.val}" in line
    assert not (tmp_path / "out").exists()


def coco_info(data: TinyData, file: Path, *, is_coco: bool = True) -> Path:
    """The images of the validation set in a file without annotations, its classes under ids of COCO."""
    content: dict[str, Any] = read_json(data.val)
    first = 46 if is_coco else 200  # from 46 on there are more than eight without a gap
    categories = [{**row, "id": first + number} for number, row in enumerate(content["categories"])]
    file.write_text(json.dumps({"images": content["images"], "categories": categories}))
    return file


def test_a_run_is_submitted_from_images_without_annotations_and_from_its_file(run, data, tmp_path):
    info = coco_info(data, tmp_path / "image_info.json")
    words = ("submit", run, "--images", data.val_images, "--info", info, "--alg", "tiny", "--out", tmp_path)
    assert run_verb(*words, "--workers", 0) == 0
    path = tmp_path / "detections_test-dev2017_tiny_results.zip"
    with zipfile.ZipFile(path) as archive:
        found = json.loads(archive.read("detections_test-dev2017_tiny_results.json"))
    evaluated = read_json(run / "detections.json")
    assert [row["bbox"] for row in found] == [row["bbox"] for row in evaluated]
    assert {row["image_id"] for row in found} == {row["image_id"] for row in evaluated}
    assert min(row["category_id"] for row in found) >= 46
    (tmp_path / "found.json").write_text(json.dumps(found))
    again = (
        "submit",
        "--detections",
        tmp_path / "found.json",
        "--info",
        info,
        "--alg",
        "tiny",
        "--out",
        tmp_path / "b",
    )
    assert run_verb(*again) == 0
    assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_a_submission_refuses_in_one_line(run, data, tmp_path, refused):
    info = coco_info(data, tmp_path / "image_info.json")
    words = ("--info", info, "--alg", "tiny", "--out", tmp_path / "out")
    images = ("--images", data.val_images)
    assert "name a RUN and --images, or --detections" in refused("submit", *words)
    assert "--images is missing" in refused("submit", run, *words)
    assert "the detector finds no masks" in refused("submit", run, *images, *words, "--kind", "segm")
    assert "need the detector of a RUN" in refused("submit", "--detections", run / "detections.json", *images, *words)
    found = refused("submit", "--detections", run / "detections.json", *words, "--kind", "segm")
    assert "detections.json: [0] of image" in found
    assert "take letters, digits" in refused("submit", run, *images, "--info", info, "--alg", "a_b")
    missing = refused("submit", run, "--images", tmp_path, *words)
    assert "4 of 4 images" in missing
    other = coco_info(data, tmp_path / "other.json", is_coco=False)
    assert "not one of COCO's 80" in refused("submit", run, *images, "--info", other, "--alg", "a", "--workers", 0)
    assert not (tmp_path / "out").exists()
