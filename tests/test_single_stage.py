"""A detector of another kind goes through everything by what it says of itself (`single_stage.py`)."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megdet.architecture import MODELS
from megdet.architecture_parts import Backbone
from megdet.cli.main import main
from megdet.contract.cases import chosen_cases
from megdet.contract.verify import verify
from megdet.errors import InputError
from megdet.inference.trained import load_detector
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe, parse_recipe, recipe_keys
from megdet.recipe_help import sections
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.training.loop import train
from megdet.training.run import RunOptions
from recipe_refusals import refusal
from small_runs import ALONE, CPU, small_recipe, write_small_set


@pytest.fixture(scope="module", autouse=True)
def single_stage() -> Iterator[Any]:
    """The module, which adds its detector to the choice while these tests run."""
    sections.cache_clear()
    module = importlib.import_module("single_stage")
    yield module
    module.forget()
    del sys.modules["single_stage"]
    sections.cache_clear()


@pytest.fixture(scope="module")
def recipe(single_stage: Any, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("data")
    write_small_set(folder, "train", 24)
    write_small_set(folder, "val", 5, seed=1)
    model = single_stage.SingleStageRecipe(backbone=Backbone(name="test_resnet"))
    model = model.with_norms({"fpn": "batch"})
    return replace(small_recipe(folder), model=model)


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "mine.yaml").write_text(dump_recipe(recipe))
    words = ["train", folder / "mine.yaml", "--run", folder / "a", "--device", "cpu", "--workers", "0"]
    words += ["--optimizer.agvm", "true", "--noise_interval", "2"]
    assert main([str(word) for word in words]) == 0
    return folder / "a"


def test_its_recipe_is_read_written_and_checked_by_its_own_dataclass(recipe: Recipe) -> None:
    assert parse_recipe(dump_recipe(recipe), "r.yaml") == recipe
    keys = recipe_keys("single_stage")
    assert {"model.kind", "model.samples", "model.backbone.name", "model.fpn.channels"} < set(keys)
    assert not any("rpn" in key or "box_head" in key for key in keys)
    message = refusal("model: {kind: single_stage, rpn: {samples: 3}}")
    assert message.startswith(
        "r.yaml: unknown key 'model.rpn': model.kind single_stage has no such key; it belongs to "
    )
    assert "faster_rcnn" in message
    message = refusal("model: {kind: single_stage, sample: 3}")
    assert message == "r.yaml: unknown key 'model.sample'; did you mean 'model.samples'?"
    assert "model.samples is 0: it must be at least 1" in refusal("", model__kind="single_stage", model__samples="0")
    assert f"model.kind is 'single': choose one of {', '.join(MODELS)}; did" in refusal("model: {kind: single}")
    knobs = {knob.key: knob for section in sections() for knob in section.knobs}
    assert "model.samples" in knobs
    assert knobs["model.kind"].choices == tuple(MODELS)


def test_it_trains_with_its_own_losses_and_counts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = read_metrics(RunFolder(run).metrics)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] == pytest.approx(line["class_loss"] + line["box_loss"]) for line in steps)
    means = [line["epoch_means"] for line in lines if "epoch_means" in line]
    assert [own["positive_ratio"] for own in means] == pytest.approx([own["positive"] / 32 for own in means])
    parts = ["backbone", "fpn", "classes", "deltas"]
    assert [list(line["agvm"]) for line in steps if "agvm" in line] == [parts]
    assert [list(line["noise"])[2:] for line in steps if "noise" in line] == [[*parts, "model"]] * 3
    assert (run / "pictures/course.png").stat().st_size > 0


def test_its_run_is_evaluated_and_gives_the_numbers_of_the_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = ["evaluate", run, "--device", "cpu", "--workers", "0", "--out", tmp_path]
    assert main([str(word) for word in words]) == 0
    assert "mmAP" in capsys.readouterr().out
    for name in ("evaluation.json", "detections.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((run / name).read_text())
    assert load_detector(RunFolder(run), CPU).model.loss_names == ("class_loss", "box_loss")


def test_the_variance_and_the_samples_of_its_run_are_measured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--workers", "0", "--json", "--out", str(tmp_path)]
    capsys.readouterr()
    assert main(["analyse", "variance", str(run), "--batch", "2", "--bn_size", "2", "--factors", "2", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [own["name"] for own in found["modules"]] == ["backbone", "fpn", "classes", "deltas", "whole"]
    assert main(["analyse", "sampling", str(run), *words]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(0 < row["anchor_ratio"] <= 0.5 and row["paper"] is None for row in rows)


@pytest.mark.distributed
def test_its_result_does_not_depend_on_the_devices(recipe: Recipe) -> None:
    assert "dense-rpn" not in chosen_cases("all", recipe)
    verdict = verify(recipe, (1, 2), cases=("base", "frozen", "agvm"), steps=2)
    assert verdict.passes, verdict.sentence()
    assert verdict.count("another layout") == 3


def test_weights_of_another_kind_are_refused_as_a_start(run: Path, recipe: Recipe, tmp_path: Path) -> None:
    two_stage = replace(small_recipe(tmp_path), data=recipe.data, start_from=str(run))
    with pytest.raises(InputError, match=r"start_from .*: its weights were trained with model\.kind single_stage"):
        train(two_stage, RunFolder(tmp_path / "run"), RunOptions(0), ALONE)
