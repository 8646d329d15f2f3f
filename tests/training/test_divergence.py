"""What a run does where it diverges: stop, skip the update, or go back to its last checkpoint and warm up again."""

import errno
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from divergence import diverge_at
from megdet.distributed.local_ranks import RankError, run_in_ranks
from megdet.distributed.world import World
from megdet.errors import DivergedError, InputError, StoppedError
from megdet.recipe import Recipe, Watch
from megdet.run_folder import checkpoint_files
from megdet.run_folder.checkpoint_files import checkpoint_step, checkpoints, latest_checkpoint, open_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.run_folder.run_state import RunState
from megdet.training import checkpoint_writer, position, step_log
from megdet.training import run as run_module
from megdet.training.evaluations.evaluations import Evaluations
from megdet.training.loop import train
from megdet.training.run import RunOptions
from megdet.training.schedule import learning_rate, rewarm_factor
from run_folders import load_checkpoint
from small_runs import ALONE, die_when_saved, furthest, small_recipe, three_epochs, write_small_sets

OPTIONS = RunOptions(workers=0)
BACK = Watch(action="roll_back", rewarm_steps=4)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    """13 images in steps of 8; three epochs end at steps 2, 4 and 5."""
    return three_epochs(tmp_path_factory.mktemp("data"))


def lines_of_steps(folder: RunFolder) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder.metrics) if "loss" in line]


def end_of(folder: RunFolder) -> dict[str, Tensor]:
    found = latest_checkpoint(folder)
    assert found is not None
    return {f"{kind}.{name}": t for kind, tensors in load_checkpoint(found)[0].items() for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("step", "kept"), [(2, "no checkpoint had been written yet"), (3, "the checkpoint of step 2 is kept")]
)
def test_a_training_that_diverges_stops_and_says_what_is_kept_and_how_to_look_at_it(
    recipe, tmp_path, monkeypatch, step, kept
):
    folder = RunFolder(tmp_path / "a run")
    message = (
        rf"^step {step}: rpn_objectness is not finite: the run failed \(learning rate .*\): lower .*; {kept}; "
        rf"to look at it: megdet replay '.*/a run' --step {step}$"
    )
    for _ in range(step - 1):  # the second time from the checkpoint
        diverge_at([step], math.nan, monkeypatch)
        with pytest.raises(DivergedError, match=message):
            train(recipe, folder, OPTIONS, ALONE)
        assert len(checkpoints(folder)) == (step > 2)
        monkeypatch.undo()


def test_a_run_that_stopped_goes_on_with_another_action_and_leaves_the_update_out(
    recipe, tmp_path, monkeypatch, capsys
):
    folder = RunFolder(tmp_path / "run")
    diverge_at([3], math.nan, monkeypatch)
    with pytest.raises(DivergedError):
        train(recipe, folder, OPTIONS, ALONE)
    capsys.readouterr()
    skips = replace(recipe, watch=Watch(action="skip", most_skipped=1))
    diverge_at([3], math.inf, monkeypatch)
    train(skips, folder, OPTIONS, ALONE)
    printed = " ".join(capsys.readouterr().err.split())
    assert "step 3: rpn_objectness is not finite: its update is left out (1 of at most 1); to look at it: " in printed
    assert "recovered 1 time (updates left out: 1, roll-backs: 0)" in printed
    lines = lines_of_steps(folder)
    assert [(line["step"], line.get("left_out")) for line in lines] == [
        (step, "rpn_objectness is not finite" if step == 3 else None) for step in range(1, 6)
    ]
    means = [line["epoch_means"] for line in read_metrics(folder.metrics) if "epoch_means" in line]
    assert [own["steps"] for own in means] == [2, 1, 1]
    assert means[1]["loss"] == lines[3]["loss"]
    assert int(end_of(folder)["watch.num_left_out"]) == 1
    with pytest.raises(InputError, match=r"holds a run of another recipe \(watch.window: 3 here, 50 there\)"):
        train(replace(recipe, watch=Watch(window=3)), folder, OPTIONS, ALONE)


def test_more_updates_than_may_be_left_out_stop_the_run(recipe, tmp_path, monkeypatch):
    diverge_at([2, 4, 5], math.nan, monkeypatch)
    message = "^step 4: rpn_objectness is not finite, after 1 updates were left out: the run failed"
    with pytest.raises(DivergedError, match=message):
        train(replace(recipe, watch=Watch(action="skip", most_skipped=1)), RunFolder(tmp_path / "a"), OPTIONS, ALONE)


def test_a_healthy_run_says_that_it_skipped_nothing(recipe, tmp_path, capsys):
    train(recipe, RunFolder(tmp_path / "run"), OPTIONS, ALONE)
    assert "every update was applied" in capsys.readouterr().err


def test_a_run_goes_back_to_its_last_checkpoint_and_warms_the_rate_up_again(recipe, tmp_path, monkeypatch, capsys):
    back, folder = replace(recipe, watch=BACK, checkpoint_steps=1), RunFolder(tmp_path / "run")
    diverge_at([4], math.nan, monkeypatch)
    train(back, folder, OPTIONS, ALONE)
    lines = lines_of_steps(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    rates = [line["learning_rate"] for line in lines]
    scheduled = [learning_rate(back, 13, step) for step in range(5)]
    assert rates == [*scheduled[:3], scheduled[3] / 4, scheduled[4] / 2]
    noted = [line for line in read_metrics(folder.metrics) if "rolled_back" in line]
    assert noted == [{"step": 3, "rolled_back": {"from": 4, "why": "rpn_objectness is not finite"}}]
    printed = " ".join(capsys.readouterr().err.split())
    assert "the run goes back to the checkpoint of step 3 (1 of at most 3); to look at it: megdet replay" in printed
    assert "--step 4 --roll-backs 0" in printed
    assert "recovered 1 time (updates left out: 0, roll-backs: 1)" in printed
    state = open_checkpoint(folder.checkpoints / "step_00000005").state
    assert (state.roll_backs, state.rolled_back_to) == (1, 3)


def train_and_diverge(world: World, recipe: Recipe, folder: Path, steps: list[int], dies_at: int = 0) -> None:
    """Diverge once in each step; with `dies_at` this process is killed when it has saved that step's checkpoint."""
    read_at_different_times(world)
    diverge_at(steps, math.nan, pytest.MonkeyPatch())
    if dies_at:
        die_when_saved(dies_at)
    train(recipe, RunFolder(folder), OPTIONS, world)


def read_at_different_times(world: World) -> None:
    """As ranks on GPUs do, each by its own clock."""
    step_log.READ_EVERY = 1 if world.is_first else 100
    step_log.StepLog.reads_at_once = property(lambda _: world.size == 1)


def end_by_divergence(world: World, recipe: Recipe, folder: Path) -> str:
    read_at_different_times(world)
    diverge_at([2], math.nan, pytest.MonkeyPatch())
    with pytest.raises(DivergedError) as ended:
        train(recipe, RunFolder(folder), OPTIONS, world)
    return str(ended.value)


@pytest.mark.distributed
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_divergence_ends_all_ranks_though_one_reads_of_it_later(tmp_path, action):
    small = small_recipe(write_small_sets(tmp_path / "data"), batch_size=4, bn_size=4)
    recipe = replace(small, watch=Watch(action=action, most_skipped=0))
    said = run_in_ranks(end_by_divergence, 2, recipe, tmp_path / "run")
    assert said[0] == said[1]
    assert said[0].startswith("step 2: rpn_objectness is not finite")


@pytest.mark.distributed
def test_two_ranks_go_back_together_though_one_reads_of_it_later_and_end_as_one_does(tmp_path):
    small = small_recipe(write_small_sets(tmp_path / "data"), batch_size=4, bn_size=4, watch=BACK)
    recipe = replace(small, schedule=replace(small.schedule, epochs=2.0))  # they end at steps 4 and 7
    run_in_ranks(train_and_diverge, 2, recipe, tmp_path / "two", [5])
    run_in_ranks(train_and_diverge, 1, recipe, tmp_path / "one", [5])
    two, one = RunFolder(tmp_path / "two"), RunFolder(tmp_path / "one")
    for folder in (two, one):
        [noted] = [line for line in read_metrics(folder.metrics) if "rolled_back" in line]
        assert (noted["step"], noted["rolled_back"]["from"]) == (4, 5)
        assert [line["step"] for line in lines_of_steps(folder)] == list(range(1, 8))
    difference, where = furthest(end_of(one), end_of(two))
    assert difference < 1e-9, where


@pytest.mark.distributed
def test_a_run_that_is_killed_after_it_went_back_ends_as_one_that_is_not(recipe, tmp_path, monkeypatch):
    back = replace(recipe, watch=BACK, checkpoint_steps=1)
    with pytest.raises(RankError, match="SIGKILL"):
        run_in_ranks(train_and_diverge, 1, back, tmp_path / "killed", [4], 4)
    killed, whole = RunFolder(tmp_path / "killed"), RunFolder(tmp_path / "whole")
    train(back, killed, OPTIONS, ALONE)
    diverge_at([4], math.nan, monkeypatch)
    train(back, whole, OPTIONS, ALONE)
    ours, theirs = end_of(whole), end_of(killed)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [4, 4, 4],
            "^step 4: rpn_objectness is not finite, after 2 roll-backs: .* checkpoint of step 3 is kept",
        ),
        ([1], "^step 1: rpn_objectness is not finite, and there is no checkpoint of an epoch or of checkpoint_steps"),
    ],
)
def test_a_run_that_cannot_go_back_or_did_so_too_often_stops(recipe, tmp_path, monkeypatch, steps, message):
    back = replace(recipe, watch=replace(BACK, most_roll_backs=2), checkpoint_steps=1)
    diverge_at(steps, math.nan, monkeypatch)
    with pytest.raises(DivergedError, match=message):
        train(back, RunFolder(tmp_path / "run"), OPTIONS, ALONE)


def test_the_rate_rises_anew_after_a_roll_back_and_takes_twice_as_long_after_each_further_one():
    recipe = Recipe(watch=BACK)
    assert [rewarm_factor(recipe, step, 0, -1) for step in (0, 7)] == [1.0, 1.0]
    assert [rewarm_factor(recipe, step, 1, 10) for step in (10, 11, 12, 13, 14)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [rewarm_factor(recipe, step, 3, 10) for step in (10, 25, 30)] == [1 / 16, 1.0, 1.0]


@pytest.mark.distributed
def test_a_checkpoint_of_a_stop_is_not_gone_back_to_so_a_stopped_run_ends_as_one_that_was_not(
    recipe, tmp_path, monkeypatch
):
    back = replace(recipe, watch=BACK, keep_checkpoints=1)
    stopped, whole, make = RunFolder(tmp_path / "stopped"), RunFolder(tmp_path / "whole"), run_module.train_step

    def stopping(trainer: Any, batches: Any, groups: Any, rate: float, step: int, *others: Any) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(trainer, batches, groups, rate, step, *others)

    with monkeypatch.context() as patches:
        patches.setattr(run_module, "train_step", stopping)
        with pytest.raises(StoppedError, match="step 3 of 5 is saved"):
            train(back, stopped, OPTIONS, ALONE)
    assert [path.name for path in checkpoints(stopped)] == ["step_00000002", "step_00000003"]
    for folder in (stopped, whole):
        with monkeypatch.context() as patches:
            diverge_at([4], math.nan, patches)
            train(back, folder, OPTIONS, ALONE)
        [noted] = [line for line in read_metrics(folder.metrics) if "rolled_back" in line]
        assert (noted["step"], noted["rolled_back"]["from"]) == (2, 4)
        assert not [*folder.path.glob("damaged_*")], "the ledger goes on"
        assert [line["step"] for line in lines_of_steps(folder)] == [1, 2, 3, 4, 5]
    ours, theirs = end_of(whole), end_of(stopped)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_later_checkpoint_that_cannot_be_deleted_does_not_end_a_run_that_goes_back(
    recipe, tmp_path, monkeypatch, capsys
):
    clock = replace(recipe, watch=BACK, checkpoint_minutes=1e-9, keep_checkpoints=3)  # after every step
    remove = shutil.rmtree

    def left(path: Path, *rest: Any, **options: Any) -> None:
        if "deleted_step_00000003" in str(path) and not options.get("ignore_errors"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, *rest, **options)

    monkeypatch.setattr(checkpoint_files.shutil, "rmtree", left)
    diverge_at([4], math.nan, monkeypatch)
    folder = RunFolder(tmp_path / "run")
    train(clock, folder, OPTIONS, ALONE)
    assert "an old checkpoint cannot be deleted (Directory not empty)" in " ".join(capsys.readouterr().err.split())
    assert [line["step"] for line in lines_of_steps(folder)] == [1, 2, 3, 4, 5]


def test_a_run_that_is_killed_while_it_goes_back_notes_it_once(recipe, tmp_path, monkeypatch):
    clock, folder = replace(recipe, watch=BACK, checkpoint_minutes=1e-9), RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        diverge_at([4], math.nan, patch)
        patch.setattr(position, "delete_later_checkpoints", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(clock, folder, OPTIONS, ALONE)
    assert checkpoint_step(checkpoints(folder)[-1]) == 3
    diverge_at([4], math.nan, monkeypatch)  # the same step, made again from the same checkpoint
    train(clock, folder, OPTIONS, ALONE)
    noted = [line for line in read_metrics(folder.metrics) if "rolled_back" in line]
    assert [(line["step"], line["rolled_back"]["from"]) for line in noted] == [(2, 4)]
    latest = latest_checkpoint(folder)
    assert latest is not None
    assert open_checkpoint(latest).state.roll_backs == 1


def raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_failing_evaluation_saves_no_step_that_diverged(recipe, tmp_path, monkeypatch):
    def look(own: Evaluations) -> None:
        if own.run.trainer.watch.num_left_out:
            raise InputError("the evaluation of step 2 failed")

    monkeypatch.setattr(Evaluations, "look", look)
    diverge_at([3], math.nan, monkeypatch)
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(step_log.StepLog, "reads_at_once", property(lambda _: False))  # as on a GPU
    monkeypatch.setattr(step_log, "READ_EVERY", 1)
    with pytest.raises(InputError, match="the evaluation of step 2 failed"):
        train(replace(recipe, watch=BACK), folder, OPTIONS, ALONE)
    assert checkpoint_step(checkpoints(folder)[-1]) == 2


def test_the_checkpoint_to_go_back_to_stays_though_a_later_one_could_not_be_written(recipe, tmp_path, monkeypatch):
    save = checkpoint_writer.save_checkpoint

    def refuse_step_4(folder: RunFolder, state: RunState, *rest: Any) -> Path:
        if state.step == 4:
            raise InputError("no space left")
        return save(folder, state, *rest)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", refuse_step_4)
    diverge_at([7], math.nan, monkeypatch)
    long = replace(recipe, watch=BACK, checkpoint_minutes=1e-9, keep_checkpoints=1, keep_best=False)
    long = replace(long, schedule=replace(long.schedule, epochs=5.0))  # epochs end at steps 2, 4, 5, 7 and 9
    long = replace(long, checkpoint_epochs=2, evaluation=replace(long.evaluation, every_epochs=0))
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(DivergedError, match=r"no checkpoint of an epoch or of checkpoint_steps to go back to"):
        train(long, folder, OPTIONS, ALONE)  # only step 4 was asked for
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", save)
    diverge_at([7], math.nan, monkeypatch)
    often, folder = replace(long, checkpoint_epochs=1), RunFolder(tmp_path / "often")
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", refuse_step_4)
    train(often, folder, OPTIONS, ALONE)
    [noted] = [line for line in read_metrics(folder.metrics) if "rolled_back" in line]
    assert noted["step"] == 5
