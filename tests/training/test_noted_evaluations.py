"""What checkpoints and later starts of a run know of its evaluations, and which score is its best."""

import shutil
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from megdet.errors import InputError
from megdet.run_folder.checkpoint_files import (
    checkpoint_step,
    checkpoints,
    latest_checkpoint,
    open_checkpoint,
    update_state,
)
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter
from megdet.training import position as position_module
from megdet.training.evaluations.evaluations import Evaluations
from megdet.training.loop import train
from megdet.training.run import RunOptions, open_run
from run_folders import evaluation_lines
from small_runs import ALONE, small_recipe, write_small_set

OPTIONS = RunOptions(workers=0)


@pytest.mark.parametrize("options", [OPTIONS, RunOptions(workers=0, evaluate_in_background=True)])
def test_an_older_evaluation_that_is_made_up_for_does_not_become_the_last(recipe, whole, tmp_path, options):
    folder = RunFolder(shutil.copytree(whole[0].path, tmp_path / "run"))
    *_, older, newest = checkpoints(folder)
    last = open_checkpoint(newest).state
    unknown = {"evaluation": None, "evaluated_step": -1, "best_score": None, "best_step": -1}
    update_state(older, msgspec.structs.replace(open_checkpoint(older).state, **unknown))
    before = {path: path.read_bytes() for path in (folder.evaluation, folder.detections)}
    assert train(recipe, folder, options, ALONE) == whole[1]
    assert open_checkpoint(newest).state == last
    made_up = open_checkpoint(older).state
    assert made_up.evaluated_step == checkpoint_step(older) == 4
    assert made_up.evaluation is not None
    assert before == {path: path.read_bytes() for path in before}
    assert sorted(step for step, _ in evaluation_lines(folder)) == [2, 4, 5]


def test_scores_of_other_validation_images_are_not_compared(recipe, whole, tmp_path, capsys):
    folder = RunFolder(shutil.copytree(whole[0].path, tmp_path / "run"))
    for path in checkpoints(folder):
        update_state(path, msgspec.structs.replace(open_checkpoint(path).state, best_score=0.99, best_step=2))
    write_small_set(tmp_path, "val", 3, seed=8)
    data = replace(
        recipe.data, val_annotations=str(tmp_path / "val.json"), val_images=small_recipe(tmp_path).data.val_images
    )
    with open_run(replace(recipe, data=data), ALONE, OPTIONS, folder) as run:
        assert "best score (99.0 at step 2) is not compared with new ones" in run.position.warnings[0]
        assert (run.position.best_score, run.position.best_step) == (None, -1)
        run.evaluated(5, whole[1])
        run.writer.wait()
    state = open_checkpoint(latest_checkpoint(folder)).state
    assert (state.best_score, state.best_step) == (whole[1].bbox.AP, 5)
    with open_run(replace(recipe, data=data), ALONE, OPTIONS, folder) as run:
        assert run.position.warnings == ()
        assert run.position.best_step == 5


def test_a_kill_while_an_evaluation_is_noted_leaves_no_checkpoint_that_seems_evaluated_before_those_that_know_it(
    recipe, whole, tmp_path, monkeypatch
):
    noted: list[int] = []
    monkeypatch.setattr(position_module, "update_state", lambda path, _state: noted.append(checkpoint_step(path)))
    with open_run(recipe, ALONE, OPTIONS, RunFolder(tmp_path / "run")) as run:
        for step in (2, 3):
            run.save(step)
        run.evaluated(2, whole[1])
        run.writer.wait()
    assert noted == [3, 2]


def test_the_best_checkpoint_stays_beside_the_newest(recipe, whole, tmp_path):
    folder = RunFolder(tmp_path / "run")
    found = []
    with open_run(replace(recipe, keep_checkpoints=1), ALONE, OPTIONS, folder) as run:
        for step in (1, 2, 3, 4, 5):
            run.recipe = replace(run.recipe, keep_best=step < 5)
            run.save(step)
            if step < 3:
                run.evaluated(step, replace(whole[1], bbox=replace(whole[1].bbox, AP=0.9 / step)))
            assert run.kept_step == step
            found.append([checkpoint_step(path) for path in checkpoints(folder)])
    assert found == [[1], [1, 2], [1, 3], [1, 4], [5]]


def test_checkpoints_that_are_still_to_be_made_up_for_stay_until_they_are_evaluated(recipe, tmp_path, monkeypatch):
    """As after a start with evaluations in the background that was stopped, which kept more than the recipe keeps."""
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluations, "due", lambda *_: None)
        with pytest.raises(InputError, match="the run is over but has no evaluation"):
            train(replace(recipe, keep_checkpoints=3), folder, OPTIONS, ALONE)
    assert [checkpoint_step(path) for path in checkpoints(folder)] == [2, 4, 5]
    train(replace(recipe, keep_checkpoints=1, keep_best=False), folder, OPTIONS, ALONE)
    assert sorted(step for step, _ in evaluation_lines(folder)) == [2, 4, 5]
    assert [checkpoint_step(path) for path in checkpoints(folder)] == [5]


def test_the_line_of_an_evaluation_is_on_the_disk_before_a_checkpoint_knows_it(recipe, tmp_path, monkeypatch):
    order: list[str] = []
    sync, update = MetricsWriter.sync, position_module.update_state

    def synced(metrics: MetricsWriter) -> None:
        order.append(f"{len(evaluation_lines(RunFolder(tmp_path / 'run')))} on disk")
        sync(metrics)

    def updated(*arguments: Any) -> None:
        order.append("known")
        update(*arguments)

    monkeypatch.setattr(MetricsWriter, "sync", synced)
    monkeypatch.setattr(position_module, "update_state", updated)
    train(recipe, RunFolder(tmp_path / "run"), OPTIONS, ALONE)
    known = [place for place, what in enumerate(order) if what == "known"]
    assert order[known[0] - 1] == "1 on disk"
    assert len(known) >= 3


def test_a_roll_back_forgets_a_best_score_of_a_step_that_is_deleted(whole, tmp_path):
    folder = RunFolder(shutil.copytree(whole[0].path, tmp_path / "run"))
    *_, older, newest = checkpoints(folder)
    for best in (checkpoint_step(older), checkpoint_step(newest)):
        for path in checkpoints(folder):  # nothing is known of them but what follows
            unknown = {"evaluation": None, "evaluated_step": -1, "best_score": None, "best_step": -1}
            update_state(path, msgspec.structs.replace(open_checkpoint(path).state, **unknown))
        known = {"best_score": 0.5, "best_step": best}
        update_state(older, msgspec.structs.replace(open_checkpoint(older).state, **known))
        position_module.mark_rolled_back(folder, checkpoint_step(older), 1)
        state = open_checkpoint(older).state
        expected = (0.5, best) if best == checkpoint_step(older) else (None, -1)
        assert (state.best_score, state.best_step) == expected
    assert not newest.exists()


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("the oldest is better", (0.4, 0)),
        ("its own is better", (0.45, 1)),
        ("other data", (0.3, 1)),
        ("the best is not there", (0.3, 1)),
        ("the oldest is damaged", (0.3, 1)),
    ],
)
def test_a_roll_back_keeps_the_best_score_that_is_left(whole, tmp_path, case, expected):
    folder = RunFolder(shutil.copytree(whole[0].path, tmp_path / "run"))
    oldest, *between, older, newest = checkpoints(folder)
    for path in (*between, newest):
        shutil.rmtree(path)
    steps = checkpoint_step(oldest), checkpoint_step(older)
    first = {"best_score": 0.4, "best_step": steps[0], "evaluation": None, "evaluated_step": -1, "val_data": "these"}
    if case == "other data":
        first["val_data"] = "others"
    if case == "the best is not there":
        first["best_step"] = steps[0] - 1
    own = 0.45 if case == "its own is better" else 0.3
    late = {"best_score": 0.5, "best_step": steps[1] + 1, "val_data": "these"}
    late |= {"evaluation": {"bbox": {"AP": own}}, "evaluated_step": steps[1]}
    for path, known in ((oldest, first), (older, late)):
        update_state(path, msgspec.structs.replace(open_checkpoint(path).state, **known))
    if case == "the oldest is damaged":
        (oldest / "state.json").write_text("{")
    position_module.mark_rolled_back(folder, steps[1], 1)
    state = open_checkpoint(older).state
    assert (state.best_score, state.best_step) == (expected[0], steps[expected[1]])
