"""Training and evaluating from Python are those of the command line."""

import subprocess
import sys

import numpy as np
import pytest

import megdet
from cli_runs import OVERRIDES, TinyData, make_data, train_exactly
from exported_file import small_recipe, write_fixed_file
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import evaluate_files
from megdet.files import read_json
from megdet.run_folder.folder import RunFolder
from small_runs import write_small_set


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


def test_a_run_from_python_is_that_of_the_command_line(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = RunFolder(train_exactly(data, tmp_path / "theirs"))
    words = [*data.options, *OVERRIDES[:-2]]
    overrides = {key[2:]: value for key, value in zip(words[::2], words[1::2], strict=True)}
    changes = {**overrides, "precision": "float64", "model": {"backbone": {"name": "test_resnet"}}}
    run = megdet.train("demo", {**changes, "model.box_head.score_threshold": 0.0}, device="cpu", workers=0)
    ours = RunFolder(run.folder)
    assert str(run.folder) == "runs/demo"
    assert ours.recipe.read_text() == theirs.recipe.read_text()
    assert read_json(ours.detections) == read_json(theirs.detections)
    assert run.evaluation.as_dict() == read_json(ours.evaluation)
    assert [picture.name for picture in run.pictures] == ["course.png", "detections.png"]
    assert run.report == ours.report
    assert {file.name for file in ours.path.iterdir()} == {file.name for file in theirs.path.iterdir()}

    before = ours.evaluation.read_text()
    assert megdet.evaluate(run.folder, device="cpu", workers=0).as_dict() == run.evaluation.as_dict()
    assert ours.evaluation.read_text() == before
    other = megdet.evaluate(
        run.folder, (data.train, data.train_images), overrides={"evaluation": {"flip": True}}, device="cpu", workers=0
    )
    assert read_json(ours.path / "evaluations/train/evaluation.json") == other.as_dict() != run.evaluation.as_dict()

    found = run.load(device="cpu")(data.val_images)
    rows = [row for own in found for row in own.to_coco()]
    assert len(rows) == len(read_json(ours.detections))


def test_an_exported_file_is_evaluated_as_it_is(tmp_path):
    write_small_set(tmp_path, "val", 5, seed=1)
    boxes, scores = np.array([[8, 4, 40, 36], [0, 0, 16, 16]], np.float32), np.array([0.9, 0.4], np.float32)
    file = write_fixed_file(tmp_path / "a.onnx", boxes, scores, np.array([2, 0]), recipe=small_recipe())
    found = megdet.evaluate(file, (tmp_path / "val.json", tmp_path / "val"))
    assert found.as_dict() == read_json(tmp_path / "a_evaluation/evaluation.json")
    assert found == evaluate_files(tmp_path / "val.json", tmp_path / "a_evaluation/detections.json")
    assert len(read_json(tmp_path / "a_evaluation/detections.json")) == 10
    with pytest.raises(InputError, match=r"a\.onnx: an exported file is as it is: leave out device"):
        megdet.evaluate(file, fold=True)


def test_what_cannot_be_meant_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"no recipe 'dmo'.*did you mean 'demo'"):
        megdet.train("dmo")
    with pytest.raises(InputError, match=r"unknown option '--schedule.epoch'.*did you mean 'schedule.epochs'"):
        megdet.train("demo", {"schedule": {"epoch": 3}})
    with pytest.raises(InputError, match="workers is -1: it is a number of processes"):
        megdet.train("demo", run=tmp_path / "run", workers=-1)
    with pytest.raises(InputError, match="not a run folder"):
        megdet.evaluate(tmp_path)


def test_one_path_where_two_are_needed_is_refused(tmp_path):
    # in a process of its own: here the tests check the types of every call before
    program = (
        f"import megdet\ntry: megdet.evaluate({str(tmp_path)!r}, 'val.json')\nexcept megdet.InputError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "data is 'val.json': give two, the annotations and the folder of their images\n"
