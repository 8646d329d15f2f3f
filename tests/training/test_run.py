"""A run is opened once and stepped by whoever needs steps."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import checkpoints
from megdet.run_folder.folder import RunFolder
from megdet.training.run import RunOptions, open_run
from megdet.training.schedule import learning_rate
from small_runs import ALONE, furthest, small_recipe, state_of, write_small_sets

OPTIONS = RunOptions(workers=0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    return small_recipe(write_small_sets(tmp_path_factory.mktemp("data")))


def test_a_run_that_is_wound_back_makes_the_same_steps_again(recipe: Recipe) -> None:
    with open_run(recipe, ALONE, OPTIONS) as run:
        assert [result.step for result in run.steps(0, 1)] == [0]
        kept = copy.deepcopy(run.trainer.state())
        norms = [float(result.gradient_norm) for result in run.steps(1, 4)]
        end = state_of(run.trainer)
        run.trainer.restore(kept)
        assert [float(result.gradient_norm) for result in run.steps(1, 4)] == norms
        assert furthest(end, state_of(run.trainer))[0] == 0.0


def test_a_step_is_made_when_it_is_asked_for(recipe: Recipe) -> None:
    with open_run(recipe, ALONE, OPTIONS) as run:
        before = state_of(run.trainer)
        steps = run.steps(0, 4)
        assert furthest(before, state_of(run.trainer))[0] == 0.0
        next(steps)
        after = state_of(run.trainer)
        name = "model.box_head.classes.weight"
        assert not torch.equal(after[name], before[name])
        next(steps)
        assert not torch.equal(after[name], state_of(run.trainer)[name])


def test_the_rate_is_the_schedules_or_the_callers(recipe: Recipe) -> None:
    with open_run(recipe, ALONE, OPTIONS) as run:
        assert [result.rate for result in run.steps(0, 2)] == [learning_rate(recipe, 13, step) for step in range(2)]
        assert [result.rate for result in run.steps(2, 4, lambda step: step / 1000)] == [0.002, 0.003]


def test_time_that_does_not_belong_to_a_step_is_left_out(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("megdet.training.run.time.perf_counter", lambda: now)
    with open_run(recipe, ALONE, OPTIONS) as run:
        found = []
        for result in run.steps(0, 3):
            found.append(result.seconds)
            now += 5.0
            if result.step == 1:
                run.restart_clock()
    assert found == [0.0, 5.0, 0.0]


def test_what_one_run_saves_the_next_one_goes_on_from(recipe: Recipe, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with open_run(recipe, ALONE, OPTIONS, folder) as run:
        for _ in run.steps(0, 2):
            pass
        run.save(2)
        saved = state_of(run.trainer)
        with pytest.raises(InputError, match="another process"), open_run(recipe, ALONE, OPTIONS, folder):
            pass
    assert [path.name for path in checkpoints(folder)] == ["step_00000002"]
    with open_run(recipe, ALONE, OPTIONS, folder) as again:
        assert again.first_step == 2
        assert furthest(saved, state_of(again.trainer))[0] == 0.0


def test_a_run_without_a_folder_leaves_nothing_and_saves_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_run(recipe, ALONE, OPTIONS) as run:
        for _ in run.steps(0, 1):
            pass
        with pytest.raises(ValueError, match="without a folder"):
            run.save(1)
    assert list(tmp_path.iterdir()) == []
