"""A run exported by the command, and what loads its files: they find what the run finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import megdet
from megdet.app.application import make_application
from megdet.app.batcher import Batcher
from megdet.app.requests import Limits
from megdet.app.runs import load_runs
from megdet.cli.main import main
from megdet.data.image import read_image
from small_runs import save_run, small_recipe, write_small_sets

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with weights of a seed, exported as it is and with 8-bit integers, by processes of their own: the checks of
    shapes that the tests install do not know the sizes of a graph that is being traced."""
    folder = tmp_path_factory.mktemp("exported")
    own = save_run(folder / "run", small_recipe(write_small_sets(folder / "data"), precision="float32"))[0].path
    for words in ([], ["--int8", "--calibration-images", "4"]):
        command = [sys.executable, "-m", "megdet", "export", str(own), *words]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    return own


@pytest.fixture(scope="module")
def picture(run, tmp_path_factory) -> Path:
    """Of the size at which it is looked at: resizing has a test of its own."""
    first = sorted((run.parent / "data" / "val").iterdir())[0]
    file = tmp_path_factory.mktemp("picture") / "a.png"
    Image.open(first).resize((72, 64)).save(file)
    return file


def test_a_loaded_file_finds_in_an_image_what_the_run_finds(run, picture):
    ours = megdet.load(run, device="cpu")(picture)
    theirs = megdet.load(run / "export" / "run.onnx")(picture)
    assert len(ours) > 3
    assert np.array_equal(ours.labels, theirs.labels)
    np.testing.assert_allclose(theirs.boxes, ours.boxes, atol=1e-2)
    np.testing.assert_allclose(theirs.scores, ours.scores, atol=1e-4)
    assert theirs.class_names == ours.class_names


def test_a_served_file_answers_with_the_boxes_of_the_run(run, picture):
    runs = load_runs([str(run), str(run / "export" / "run.onnx")], "", {}, fold=False)
    with Batcher(runs) as batcher:
        client = TestClient(make_application(batcher, Limits()), "http://localhost")
        image = picture.read_bytes()
        answers = [
            client.post(
                "/api/detect", params={"run": index}, content=image, headers={"Content-Type": "image/png"}
            ).json()
            for index in (0, 1)
        ]
    assert [own["run"] for own in answers] == ["run", "run.onnx"]
    ours, theirs = (own["objects"] for own in answers)
    assert len(ours) > 3
    assert [own["name"] for own in theirs] == [own["name"] for own in ours]
    np.testing.assert_allclose([own["box"] for own in theirs], [own["box"] for own in ours], atol=1e-2)


def test_a_file_of_8_bit_integers_is_smaller_and_works_wherever_the_other_does(run, picture, tmp_path):
    floats, integers = run / "export" / "run.onnx", run / "export" / "run-int8.onnx"
    proof = json.loads((run / "export" / "run-int8.onnx.proof.json").read_text())
    assert proof["int8"]["layers"] > proof["int8"]["float_layers"] > 0
    assert proof["int8"]["before"]["bytes"] == floats.stat().st_size
    assert proof["int8"]["after"]["bytes"] == integers.stat().st_size < 0.6 * floats.stat().st_size
    detector = megdet.load(integers)
    assert len(detector(picture)) > 3
    assert len(detector([read_image(picture), read_image(picture)])) == 2
    assert main(["evaluate", str(integers), "--out", str(tmp_path / "evaluation")]) == 0
    assert main(["detect", str(integers), str(picture), "--out", str(tmp_path / "drawn")]) == 0
