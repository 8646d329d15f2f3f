"""evaluate and detect with an exported file, in processes that may not load torch."""

import json
import subprocess
import sys

import numpy as np
import pytest

from exported_file import small_recipe, write_fixed_file
from small_runs import write_small_set

COMMAND = """
import sys
sys.modules["torch"] = None  # an import of it would fail
from megdet.cli.main import main
code = main(sys.argv[1:])
assert not any(name.split(".")[0] in ("torchvision", "timm") for name in sys.modules)
assert "matplotlib.figure" not in sys.modules  # boxes are drawn without it
sys.exit(code)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    write_small_set(folder, "val", 5, seed=1)
    boxes = np.array([[8, 4, 40, 36], [0, 0, 16, 16]], np.float32)
    scores, labels = np.array([0.9, 0.4], np.float32), np.array([2, 0])
    write_fixed_file(folder / "model.onnx", boxes, scores, labels, recipe=small_recipe())
    return folder


def run(*words):
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, words)], capture_output=True, text=True, timeout=300
    )


def paths(folder):
    return folder / "val.json", folder / "val"


def test_detect_draws_what_an_exported_file_finds(folder):
    _, images = paths(folder)
    done = run("detect", folder / "model.onnx", images, "--score", "0.5", "--out", folder / "drawn")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 detections drawn" in done.stdout
    found = json.loads((folder / "drawn/detections.json").read_text())
    assert {row["category"] for row in found} == {"bolt", "gear"}
    assert len(list((folder / "drawn").glob("*.png"))) == 5


def test_evaluate_counts_what_an_exported_file_finds(folder):
    annotations, images = paths(folder)
    done = run("evaluate", folder / "model.onnx", "--data", annotations, images)
    assert done.returncode == 0, done.stderr
    out = folder / "model_evaluation"
    assert 0 <= json.loads((out / "evaluation.json").read_text())["bbox"]["AP"] <= 1
    assert len(json.loads((out / "detections.json").read_text())) == 10


def test_what_a_file_cannot_do_any_more_is_refused(folder):
    for words, why in (
        (["evaluate", "model.onnx", "--fold"], "--fold is for a RUN"),
        (["evaluate", "model.onnx", "--evaluation.flip", "true"], "recipe of an exported file is fixed"),
        (["detect", "model.onnx", "none.png"], "no such file"),
    ):
        done = run(words[0], folder / words[1], *words[2:])
        assert done.returncode == 2
        assert why in done.stderr
        assert "Traceback" not in done.stderr
