"""Stop anywhere, go on with the same command, also on another number of ranks: the run is the one without a stop."""

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import timm
import torch

from megdet.architecture_parts import Backbone
from megdet.distributed.local_ranks import RankError, run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError, StoppedError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import (
    checkpoints,
    latest_checkpoint,
    open_checkpoint,
    update_state,
)
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.run_folder.run_state import RunState
from megdet.run_folder.sessions import read_environment
from megdet.training import checkpoint_writer
from megdet.training import run as run_module
from megdet.training.evaluations import evaluations
from megdet.training.loop import train
from megdet.training.run import RunOptions
from run_folders import evaluation_lines, load_checkpoint
from small_runs import ALONE, die_when_saved, furthest, small_recipe, write_small_set

OPTIONS = RunOptions(workers=0)


def train_until_killed(world: World, recipe: Recipe, folder: Path, step: int) -> None:
    """Train, and die at once when the checkpoint of a step is written."""
    die_when_saved(step)
    train(recipe, RunFolder(folder), OPTIONS, world)


def train_whole(world: World, recipe: Recipe, folder: Path) -> Evaluation:
    return train(recipe, RunFolder(folder), OPTIONS, world)


def end_of(folder: RunFolder) -> dict[str, torch.Tensor]:
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.name == "step_00000005"
    return {f"{kind}.{name}": t for kind, tensors in load_checkpoint(found)[0].items() for name, t in tensors.items()}


def timeless(folder: RunFolder) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if not key.endswith(("seconds", "memory_bytes"))}
        for line in read_metrics(folder.metrics)
    ]


@pytest.fixture(scope="module")
def killed(recipe: Recipe, tmp_path_factory: Any) -> Path:
    """A run that was killed when step 3, in the middle of an epoch, was saved."""
    folder: Path = tmp_path_factory.mktemp("killed")
    with pytest.raises(RankError, match="rank 0 of 1 was ended by SIGKILL"):
        run_in_ranks(train_until_killed, 1, replace(recipe, checkpoint_steps=1), folder / "run", 3)
    names = [path.name for path in checkpoints(RunFolder(folder / "run"))]
    assert names == ["step_00000002", "step_00000003"]
    return folder / "run"


@pytest.fixture
def stopped(killed: Path, tmp_path: Path) -> RunFolder:
    """A copy of it."""
    return RunFolder(shutil.copytree(killed, tmp_path / "run"))


@pytest.mark.distributed
def test_a_killed_run_that_goes_on_ends_bitwise_where_one_without_a_stop_does(recipe, whole, stopped):
    with stopped.metrics.open("a") as file:  # of a step that was done and not saved, and half a line
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    numbers = train(recipe, stopped, OPTIONS, ALONE)
    ours, theirs = end_of(whole[0]), end_of(stopped)
    assert ours.keys() == theirs.keys()
    assert {key.split(".")[0] for key in ours} == {"model", "optimizer", "averages", "watch"}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert timeless(stopped) == timeless(whole[0])
    assert numbers == whole[1]
    assert stopped.detections.read_text() == whole[0].detections.read_text()
    assert len(read_environment(stopped)) == 2


@pytest.mark.distributed
def test_an_evaluation_that_was_written_down_just_before_the_kill_is_there_once(recipe, whole, stopped):
    for path in checkpoints(stopped):  # the line is in metrics.jsonl already
        unknown = {"evaluation": None, "evaluated_step": -1, "best_score": None, "best_step": -1}
        update_state(path, msgspec.structs.replace(open_checkpoint(path).state, **unknown))
    train(recipe, stopped, OPTIONS, ALONE)
    assert evaluation_lines(stopped) == evaluation_lines(whole[0])
    ours, theirs = latest_checkpoint(whole[0]), latest_checkpoint(stopped)
    assert open_checkpoint(ours).state == open_checkpoint(theirs).state


@pytest.mark.distributed
def test_a_rotten_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(recipe, whole, stopped, capsys):
    rotten = stopped.checkpoints / "step_00000003/optimizer.safetensors"
    content = bytearray(rotten.read_bytes())
    content[-1] ^= 1
    rotten.write_bytes(content)
    train(recipe, stopped, OPTIONS, ALONE)
    said = " ".join(capsys.readouterr().err.split())
    assert "optimizer.safetensors is not what was saved" in said
    assert "the run goes on from that of step 2" in said
    assert (stopped.checkpoints / "damaged_step_00000003/model.safetensors").exists()
    ours, theirs = end_of(whole[0]), end_of(stopped)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert timeless(stopped) == timeless(whole[0])


@pytest.mark.distributed
def test_a_checkpoint_of_a_newer_megdet_stops_the_start_and_stays_as_it_is(recipe, stopped):
    *_, newest = checkpoints(stopped)
    state = newest / "state.json"
    state.write_text(state.read_text().replace('"format": 3', '"format": 4'))
    before = {path: path.read_bytes() for path in stopped.checkpoints.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"^\S*state\.json has format 4, this megdet reads 2 and 3: update megdet$"):
        train(recipe, stopped, OPTIONS, ALONE)
    assert before == {path: path.read_bytes() for path in stopped.checkpoints.rglob("*") if path.is_file()}


@pytest.mark.distributed
def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_changes_nothing(recipe, stopped):
    for path in checkpoints(stopped):
        (path / "model.safetensors").write_bytes(b"")
    before = {path: path.read_bytes() for path in stopped.checkpoints.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"damaged: .*step_00000003/model\.safetensors is not what was saved"):
        train(recipe, stopped, OPTIONS, ALONE)
    assert before == {path: path.read_bytes() for path in stopped.checkpoints.rglob("*") if path.is_file()}


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_not_the_run(recipe, whole, tmp_path, capsys):
    save, full, folder = checkpoint_writer.save_checkpoint, (2, 3), RunFolder(tmp_path / "run")

    def filling(own: RunFolder, state: RunState, *arguments: Any) -> Any:
        if state.step in full:
            raise InputError("No space left on device")
        return save(own, state, *arguments)

    with mock.patch.object(checkpoint_writer, "save_checkpoint", filling):
        train(replace(recipe, checkpoint_steps=1), folder, OPTIONS, ALONE)
    said = " ".join(capsys.readouterr().err.split())
    for step in full:
        assert said.count(f"the checkpoint of step {step} is not saved: No space left on device; the run goes on") == 1
    assert said.count("not saved") == 2
    ours, theirs = end_of(whole[0]), end_of(folder)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture
def default_interrupt() -> Iterator[None]:
    """As at a terminal: whoever started the tests may have ignored interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name != "posix", reason="there are no such signals here")
def test_signals_anywhere_in_an_epoch_lose_no_step_and_leave_the_run_without_a_stop(
    recipe, whole, tmp_path, monkeypatch, default_interrupt
):
    folder, make, evaluate = RunFolder(tmp_path / "run"), run_module.train_step, evaluations.detect_dataset
    done: list[int] = []

    def told(step: int, number: int | None) -> None:
        def stepping(*arguments: Any) -> Any:
            done.append(arguments[4] + 1)
            if done[-1] == step:
                os.kill(os.getpid(), number or signal.SIGTERM)
            return make(*arguments)

        monkeypatch.setattr(run_module, "train_step", stepping)

    for number, code, step in ((signal.SIGUSR1, 75, 1), (signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 4)):
        told(step, number)
        with pytest.raises(StoppedError, match=rf"step {step} of 5 is saved, the same command goes on") as stopped:
            train(recipe, folder, OPTIONS, ALONE)
        assert stopped.value.code == code
        newest = latest_checkpoint(folder)
        assert newest is not None
        assert open_checkpoint(newest).state.step == step

    def evaluating(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    told(-1, None)
    with monkeypatch.context() as patch:
        patch.setattr(evaluations, "detect_dataset", evaluating)  # that of step 4 is still due
        with pytest.raises(StoppedError, match=r"^stopped by SIGTERM; the same command goes on from the last"):
            train(recipe, folder, OPTIONS, ALONE)
    assert train(recipe, folder, OPTIONS, ALONE) == whole[1]
    assert done == [1, 2, 3, 4, 5], "no step is made again"
    ours, theirs = end_of(whole[0]), end_of(folder)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert timeless(folder) == timeless(whole[0]), "the means of the epochs too"
    assert folder.detections.read_text() == whole[0].detections.read_text()


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_ranks(recipe, whole, stopped, tmp_path):
    found = run_in_ranks(train_whole, 2, recipe, stopped.path)
    worst, where = furthest(end_of(whole[0]), end_of(stopped))
    assert worst < 1e-9, where
    assert found[0] == found[1]
    for ours, theirs in zip(timeless(whole[0]), timeless(stopped), strict=True):
        if "loss" in ours:
            assert theirs == pytest.approx(ours, rel=1e-8, abs=1e-12)
        else:
            numbers = [
                line["evaluation"]["bbox"] if "evaluation" in line else line["epoch_means"] for line in (theirs, ours)
            ]
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-3)


def test_a_finished_run_repeated_returns_its_numbers_at_once(recipe, whole, tmp_path, monkeypatch):
    folder = RunFolder(shutil.copytree(whole[0].path, tmp_path / "run"))
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}

    def never(*_args, **_options):
        raise AssertionError("a finished run neither trains nor evaluates")

    monkeypatch.setattr(run_module, "train_step", never)
    monkeypatch.setattr(evaluations, "detect_dataset", never)
    assert train(recipe, folder, OPTIONS, ALONE) == whole[1]
    after = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} == {folder.environment}


def test_another_recipe_in_the_folder_is_refused_and_nothing_is_lost(recipe, whole):
    before = {path: path.read_bytes() for path in whole[0].path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"another recipe \(optimizer\.momentum: 0\.8 here, 0\.9 there\)"):
        train(replace(recipe, optimizer=replace(recipe.optimizer, momentum=0.8)), whole[0], OPTIONS, ALONE)
    assert before == {path: path.read_bytes() for path in whole[0].path.rglob("*") if path.is_file()}


def other_data(tmp_path: Path, whole: RunFolder, recipe: Recipe, count: int, seed: int) -> tuple[RunFolder, Recipe]:
    """The run with other images under the names of its recipe."""
    write_small_set(tmp_path, "train", count, seed)
    write_small_set(tmp_path, "val", 5, seed=1)
    folder = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    moved = replace(recipe, data=small_recipe(tmp_path).data)
    folder.recipe.write_text(
        folder.recipe.read_text().replace(str(Path(recipe.data.train_images).parent), str(tmp_path))
    )
    return folder, moved


def test_more_images_than_the_run_was_trained_on_are_refused(recipe, whole, tmp_path):
    folder, moved = other_data(tmp_path, whole[0], recipe, count=14, seed=0)
    with pytest.raises(InputError, match=r"trained on 13 images of 3 classes, .* has 14 of 3: choose another --run"):
        train(moved, folder, OPTIONS, ALONE)


def test_other_images_in_the_same_number_are_refused(recipe, whole, tmp_path):
    folder, moved = other_data(tmp_path, whole[0], recipe, count=13, seed=7)
    with pytest.raises(InputError, match="images, boxes or weights have changed"):
        train(moved, folder, OPTIONS, ALONE)


def test_a_run_goes_on_without_the_files_it_started_from(recipe, tmp_path, whole, monkeypatch):
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    short = replace(
        recipe,
        schedule=replace(recipe.schedule, epochs=1.0),
        model=replace(recipe.model, backbone=Backbone(name="test_resnet", weights=str(weights))),
        start_from=str(shutil.copytree(whole[0].path, tmp_path / "source")),
    )
    numbers = train(short, RunFolder(tmp_path / "run"), OPTIONS, ALONE)
    weights.unlink()
    shutil.rmtree(tmp_path / "source")
    assert train(short, RunFolder(tmp_path / "run"), OPTIONS, ALONE) == numbers
    with pytest.raises(InputError, match=r"backbone.weights"):
        train(short, RunFolder(tmp_path / "new"), OPTIONS, ALONE)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_tells_its_step_numbers_and_classes(whole):
    found = latest_checkpoint(whole[0])
    assert found is not None
    state = open_checkpoint(found).state
    assert state.step == 5
    assert state.class_names == ("bolt", "nut", "gear")
    assert state.category_ids == (10, 20, 30)
    assert state.evaluation is not None
    assert Evaluation.from_dict(state.evaluation) == whole[1]
    scores = {line["step"]: line["evaluation"]["bbox"]["AP"] for line in timeless(whole[0]) if "evaluation" in line}
    assert state.best_score == max(scores.values())
    assert state.best_step == max(scores, key=lambda step: scores[step])
