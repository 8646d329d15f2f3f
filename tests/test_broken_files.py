"""Every reader of files that others write gives a result or one clear line, whatever stands in the file."""

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_factories import save_image, two_images, write_set
from megdet.data.check import check_dataset
from megdet.data.coco import load_coco
from megdet.data.formats.csv_table import convert_csv
from megdet.data.formats.cvat import convert_cvat
from megdet.data.formats.label_studio import convert_label_studio
from megdet.data.formats.labelme import convert_labelme
from megdet.data.formats.voc import convert_voc
from megdet.data.formats.yolo import convert_yolo
from megdet.evaluation.coco_numbers import evaluate_files
from megdet.model.weight_file import read_tensors
from megdet.paper.outcome import Outcome, read_outcome
from megdet.recipe_file import packaged_recipes, parse_recipe, recipe_keys
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.run_folder.sessions import read_environment
from mutants import mutants_of_json, mutants_of_text, refused_or_read

NUMBER = pytest.mark.parametrize("number", [30, pytest.param(1000, marks=pytest.mark.slow)], ids=["few", "many"])
"""Mutants of each file."""

RECIPE = packaged_recipes()["demo"] + "seed: 0x1F\nstart_from: ''\n"
YAML = b"path: ../data\ntrain: images/train\nnc: 2\nnames:\n  0: ant\n  1: 'bee'\n"
VOC = """<?xml version="1.0" encoding="utf-8"?><annotation><filename>a.jpg</filename><size><width>40</width>
<height>30</height></size><object><name>\u732b</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin>
<xmax>10.5</xmax><ymax>20</ymax></bndbox></object></annotation>"""
FOUND = [{"image_id": 3, "category_id": 9, "bbox": [1, 2, 10.5, 20], "score": 0.5, "more": {}}]
LENGTHS = {"size": [30, 40], "counts": "P1b0<00000000000000000Tk0"}


def test_mutants_are_strange_and_always_the_same() -> None:
    texts = [list(mutants_of_text(YAML, 50)) for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 45
    values = [list(mutants_of_json(FOUND, 50)) for _ in range(2)]
    assert values[0] == values[1]
    assert len(set(values[0])) > 40


def counted(answers: Iterator[str]) -> None:
    """Some mutants are refused and some are read: else the mutants or the reader would be for nothing."""
    refused = [bool(answer) for answer in answers]
    assert 0 < sum(refused) < len(refused)


@NUMBER
def test_recipes(number: int) -> None:
    def read(mutant: bytes) -> str:
        return refused_or_read(lambda: parse_recipe(mutant.decode(errors="surrogateescape"), "mine.yaml"), "mine.yaml")

    counted(map(read, mutants_of_text(RECIPE.encode(), number)))


@NUMBER
def test_overrides(number: int) -> None:
    keys = recipe_keys()

    def read(pair: tuple[int, bytes]) -> str:
        key, value = keys[pair[0] % len(keys)], pair[1].decode(errors="surrogateescape")
        return refused_or_read(lambda: parse_recipe("", "mine.yaml", {key: value}), "mine.yaml", f"--{key}")

    counted(map(read, enumerate(mutants_of_text(b"[1, 2.5]", number))))


def reading_file(path: Path, read: Callable[[], object], *names: str) -> Callable[[bytes], str]:
    """Write a mutant and read it; a refusal has the file's name, or another of these."""

    def check(mutant: bytes) -> str:
        path.write_bytes(mutant)
        return refused_or_read(read, path.name, *names)

    return check


@NUMBER
def test_yolo(tmp_path: Path, number: int) -> None:
    save_image(tmp_path / "images/a.jpg", 40, 30)
    label = tmp_path / "labels/a.txt"
    label.parent.mkdir()
    label.write_text("0 0.5 0.5 0.2 0.2")
    read = partial(convert_yolo, tmp_path, tmp_path / "out")
    counted(map(reading_file(tmp_path / "data.yaml", read), mutants_of_text(YAML, number)))
    (tmp_path / "data.yaml").write_bytes(YAML)
    lines = b"0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.5 0.1 0.3 0.4\n"
    counted(map(reading_file(label, read), mutants_of_text(lines, number)))


@NUMBER
@pytest.mark.parametrize("encoding", ["utf-8", "gb2312", "shift_jis", "utf-16"])
def test_voc(tmp_path: Path, number: int, encoding: str) -> None:
    save_image(tmp_path / "JPEGImages/a.jpg", 40, 30)
    (tmp_path / "Annotations").mkdir()
    content = VOC.replace("utf-8", encoding).replace("\u732b", "\u72ac").encode(encoding)
    read = reading_file(tmp_path / "Annotations/a.xml", partial(convert_voc, tmp_path, tmp_path / "out"))
    counted(map(read, mutants_of_text(content, number)))


_SHAPE = {"label": "\u732b", "points": [[1, 2], [3, 4.5]], "shape_type": "rectangle", "group_id": 1}
_VALUE = {"x": 1, "y": 2, "width": 3, "height": 4.5, "rotation": 5, "rectanglelabels": ["a"]}
LABELME = {"imagePath": "a.jpg", "imageHeight": 30, "imageWidth": 40, "shapes": [_SHAPE]}
LABEL_STUDIO = [
    {
        "data": {"image": "/data/upload/1/0a1b2c3d-a.jpg"},
        "annotations": [{"result": [{"type": "rectanglelabels", "value": _VALUE}]}],
    }
]
CVAT = """<?xml version="1.0" encoding="utf-8"?><annotations><image name="a.jpg" width="40" height="30" subset="train">
<box label="\u732b" xtl="1" ytl="2" xbr="3" ybr="4" rotation="5"/><polygon label="a" points="1,2;3,4;5,6"/>
</image></annotations>"""
CSV = "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,40,30,\u732b,1,2,3.5,4\na.jpg,40,30,b,0,0,40,30\n"


@NUMBER
@pytest.mark.parametrize(
    ("convert", "content"),
    [
        (convert_labelme, json.dumps(LABELME)),
        (convert_label_studio, json.dumps(LABEL_STUDIO)),
        (convert_cvat, CVAT),
        (convert_csv, CSV),
    ],
)
def test_files_of_labelling_tools(tmp_path: Path, number: int, convert: Callable[..., Any], content: str) -> None:
    save_image(tmp_path / "images/a.jpg", 40, 30)
    file = tmp_path / "labels/a.txt"
    file.parent.mkdir()
    read = reading_file(file, partial(convert, file, tmp_path / "out", tmp_path / "images"))
    counted(map(read, mutants_of_text(content.encode(), number)))
    if content.startswith(("{", "[")):
        counted(map(read, mutants_of_json(json.loads(content), number)))
    assert {path.parent for path in (tmp_path / "out").rglob("*.json")} == {tmp_path / "out/annotations"}


@NUMBER
def test_ground_truth_and_detections(tmp_path: Path, number: int) -> None:
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    truth.write_text(json.dumps(two_images()))
    read = reading_file(found, partial(evaluate_files, truth, found))
    counted(map(read, mutants_of_json(FOUND, number)))
    counted(map(read, mutants_of_text(json.dumps(FOUND).encode(), number)))
    found.write_text(json.dumps(FOUND))
    read = reading_file(truth, partial(evaluate_files, truth, found))
    counted(map(read, mutants_of_json(two_images(), number)))


@NUMBER
def test_masks_of_ground_truth_and_of_detections(tmp_path: Path, number: int) -> None:
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    whole, masked = two_images(), [{**own, "segmentation": LENGTHS} for own in FOUND]
    for image in whole["images"]:
        image |= {"height": 30, "width": 40}
    for index, annotation in enumerate(whole["annotations"]):
        annotation["segmentation"] = [[1, 2, 11, 2, 11.5, 22]] if index % 2 else LENGTHS
    truth.write_text(json.dumps(whole))
    read = reading_file(found, partial(evaluate_files, truth, found))
    counted(map(read, mutants_of_json(masked, number)))
    counted(map(read, mutants_of_text(json.dumps(masked).encode(), number)))
    found.write_text(json.dumps(masked))
    counted(map(reading_file(truth, partial(evaluate_files, truth, found)), mutants_of_json(whole, number)))


@NUMBER
def test_annotations(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    document = {"info": {"year": 2026, "more": [1, 2, 3]}, "licenses": [{"id": 1, "name": ""}], **two_images()}
    file, images = write_set(tmp_path, document)

    def both() -> None:
        check_dataset(file, images)  # never raises
        load_coco(file, images, keep_empty=True)

    read = reading_file(file, both, "images", "/etc/passwd")
    counted(map(read, mutants_of_json(document, number)))
    counted(map(read, mutants_of_text(json.dumps(document).encode(), number)))


@NUMBER
def test_files_of_a_run(tmp_path: Path, number: int) -> None:
    folder = RunFolder(tmp_path)
    session = {"started_utc": "2026", "devices": [{"name": "x"}], "git": None, "world_size": 1}
    read = reading_file(folder.environment, partial(read_environment, folder))
    counted(map(read, mutants_of_json({"sessions": [session]}, number)))
    lines = b"".join(json.dumps({"step": i, "loss": 1.5, "more": "NaN"}).encode() + b"\n" for i in range(3))
    counted(map(reading_file(folder.metrics, partial(read_metrics, folder.metrics)), mutants_of_text(lines, number)))
    outcome: dict[str, Any] = asdict(Outcome("trained", "", 3, 0.5, 1, 30.0, None, 40.0, "a", "b"))
    read = reading_file(tmp_path / "outcome.json", partial(read_outcome, folder))
    counted(map(read, mutants_of_json(outcome, number)))


@NUMBER
@pytest.mark.filterwarnings("ignore")  # torch's words about formats of its past
@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pkl"])
def test_weights(tmp_path: Path, number: int, suffix: str) -> None:
    file = tmp_path / f"weights.{suffix}"
    tensors = {"a.weight": torch.ones(2, 3), "b.bias": torch.zeros(4)}
    if suffix == "pkl":
        file.write_bytes(pickle.dumps({name: tensor.numpy() for name, tensor in tensors.items()}))
    else:
        torch.save(tensors, file) if suffix == "pth" else save_file(tensors, file)
    read = reading_file(file, lambda: read_tensors(file, "backbone.weights"))
    counted(map(read, mutants_of_text(file.read_bytes(), number)))
