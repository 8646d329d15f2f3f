"""An evaluation in a process beside the training finds what one in the foreground finds, and dies with the training."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megdet.distributed import helper
from megdet.distributed.local_ranks import RankError, run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError, TooLittleMemoryError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.recipe import Recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.runtime import operations_on_one_thread
from megdet.training import run as run_module
from megdet.training import step_log
from megdet.training.evaluations import background as background_module
from megdet.training.evaluations import evaluations as evaluations_module
from megdet.training.evaluations.background import BackgroundEvaluations, overrides_beside
from megdet.training.evaluations.evaluations import Evaluations
from megdet.training.loop import train
from megdet.training.run import RunOptions
from run_folders import assert_same_run, content, evaluation_lines, steps
from small_runs import ALONE, die_when_saved, three_epochs, write_small_set

FOREGROUND, BACKGROUND = RunOptions(workers=0), RunOptions(workers=0, evaluate_in_background=True)
PATIENCE = 60.0
Popen = subprocess.Popen


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    return replace(three_epochs(tmp_path_factory.mktemp("data")), keep_checkpoints=1)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: Any) -> tuple[RunFolder, Evaluation]:
    """The run with its evaluations in the foreground."""
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    return folder, train(recipe, folder, FOREGROUND, ALONE)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def runs(pid: int) -> bool:
    """Whether the process lives; one that ended and that nobody asked for its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "that took too long"
        time.sleep(0.05)


class Watched:
    """The evaluation processes that a training starts, each stopped at once if asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, is_stopped: bool = False) -> None:
        self.started: list[subprocess.Popen[bytes]] = []
        self.is_stopped = is_stopped
        monkeypatch.setattr(helper.subprocess, "Popen", self.start)

    def start(self, *arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = Popen(*arguments, **options)
        if helper.__name__ in arguments[0]:  # and not git, which tells the commit
            if self.is_stopped:
                os.kill(process.pid, signal.SIGSTOP)
            self.started.append(process)
        return process

    @property
    def has_ended(self) -> bool:
        return bool(self.started) and not runs(self.started[0].pid)


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[[], object]]:
    """What happens before the steps of these numbers, counted from 1."""
    happens: dict[int, Callable[[], object]] = {}
    step = run_module.train_step

    def watched_step(*arguments: Any) -> Any:
        happens.get(arguments[4] + 1, lambda: None)()
        return step(*arguments)

    monkeypatch.setattr(run_module, "train_step", watched_step)
    return happens


@pytest.fixture
def broken_image(recipe: Recipe, before_step: dict[int, Callable[[], object]]) -> Iterator[Path]:
    """An image that breaks when the training has begun: before that it would be refused."""
    file = Path(recipe.data.val_images) / "3.png"
    whole = file.read_bytes()
    before_step[1] = lambda: file.write_bytes(whole[:300])
    yield file
    file.write_bytes(whole)


def mend(recipe: Recipe, file: Path, tmp_path: Path) -> None:
    write_small_set(tmp_path / "again", "val", 5, seed=1)
    shutil.copy(tmp_path / "again/val/3.png", file)


def test_the_run_folder_is_the_same_as_with_evaluations_in_the_foreground(recipe, whole, folder):
    numbers = train(recipe, folder, BACKGROUND, ALONE)
    assert numbers == whole[1]
    assert [step for step, _ in evaluation_lines(folder)] == [2, 4, 5]
    assert_same_run(folder, whole[0])


def test_the_training_goes_on_and_a_checkpoint_stays_until_it_is_evaluated(recipe, folder, monkeypatch, capsys):
    watched = Watched(monkeypatch, is_stopped=True)

    def finish(run: Evaluations) -> None:
        assert [process.poll() for process in watched.started] == [None]
        assert run.needed_checkpoints == steps(folder) == [2, 4, 5]
        raise InputError("every step is done")

    monkeypatch.setattr(Evaluations, "finish", finish)
    with pytest.raises(InputError, match="every step is done"):
        train(recipe, folder, BACKGROUND, ALONE)
    assert [line["step"] for line in read_metrics(folder.metrics) if "loss" in line] == [1, 2, 3, 4, 5]
    said = [line for line in capsys.readouterr().err.splitlines() if "waits for that of step" in line]
    assert len(said) == 1
    assert said[0].startswith("the evaluation of step 4 waits for that of step 2:")


@pytest.mark.slow
def test_evaluations_are_written_down_while_the_training_goes_on(
    recipe, whole, folder, monkeypatch, before_step, tmp_path
):
    watched = Watched(monkeypatch)
    found = []
    before_step[3] = lambda: wait_until(lambda: watched.has_ended)
    before_step[4] = lambda: found.append(evaluation_lines(folder))
    monkeypatch.setattr(step_log, "READ_EVERY", 1)
    train(recipe, folder, BACKGROUND, ALONE)
    assert [step for step, _ in found[0]] == [2]
    assert_same_run(folder, whole[0])


@pytest.mark.slow
def test_an_epoch_that_is_evaluated_is_saved_wherever_it_is_evaluated(recipe, tmp_path):
    rare = replace(
        recipe,
        schedule=replace(recipe.schedule, epochs=4.5),
        evaluation=replace(recipe.evaluation, every_epochs=3),
        checkpoint_epochs=2,
        keep_checkpoints=9,
    )
    folders = [RunFolder(tmp_path / name) for name in ("foreground", "background")]
    for folder, options in zip(folders, (FOREGROUND, BACKGROUND), strict=True):
        train(rare, folder, options, ALONE)
    assert [steps(folder) for folder in folders] == [[4, 5, 7, 8]] * 2
    assert evaluation_lines(folders[0]) == evaluation_lines(folders[1])
    assert content(folders[0]) == content(folders[1])


@pytest.mark.slow
def test_a_failing_evaluation_stops_the_run_with_its_reason_after_saving_and_is_made_up_for(
    recipe, whole, folder, monkeypatch, before_step, broken_image, tmp_path
):
    watched = Watched(monkeypatch)
    before_step[3] = lambda: wait_until(lambda: watched.has_ended)
    monkeypatch.setattr(step_log, "READ_EVERY", 1)
    words = r"the evaluation of step 2 in the background failed: .*val/3\.png: cannot be read"
    with pytest.raises(InputError, match=words) as raised:
        train(recipe, folder, BACKGROUND, ALONE)
    assert "\n" not in str(raised.value)
    assert steps(folder) == [2, 3]  # within the second epoch, and the one that was not evaluated
    mend(recipe, broken_image, tmp_path)
    before_step.clear()
    assert train(recipe, folder, BACKGROUND, ALONE) == whole[1]
    assert_same_run(folder, whole[0])


@pytest.mark.slow
def test_the_last_evaluation_failing_keeps_the_run_for_the_next_start(
    recipe, whole, folder, before_step, broken_image, tmp_path
):
    last_only = replace(recipe, evaluation=replace(recipe.evaluation, every_epochs=0))
    with pytest.raises(InputError, match="the evaluation of step 5 in the background failed"):
        train(last_only, folder, BACKGROUND, ALONE)
    mend(recipe, broken_image, tmp_path)
    before_step.clear()
    assert train(last_only, folder, BACKGROUND, ALONE) == whole[1]
    assert evaluation_lines(folder) == evaluation_lines(whole[0])[-1:]


def test_an_evaluation_that_is_killed_stops_the_run_with_its_step(recipe, folder, monkeypatch, before_step):
    watched = Watched(monkeypatch)

    def kill() -> None:
        os.kill(watched.started[0].pid, signal.SIGKILL)
        wait_until(lambda: watched.has_ended)

    before_step[3] = kill
    with pytest.raises(InputError, match=r"step 2 in the background failed: its process was ended by SIGKILL"):
        train(recipe, folder, BACKGROUND, ALONE)
    assert steps(folder) == [2, 3]  # the run is saved behind the step in which that is seen


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_a_training_that_stops_ends_its_evaluation(error, recipe, folder, monkeypatch, before_step):
    watched = Watched(monkeypatch, is_stopped=True)

    def stop() -> None:
        raise error("enough")

    before_step[3] = stop
    with pytest.raises(error, match="enough"):
        train(recipe, folder, BACKGROUND, ALONE)
    assert [process.poll() for process in watched.started] == [-signal.SIGKILL]
    assert list(folder.path.glob(".evaluation*")) == []


def train_until_killed(world: World, recipe: Recipe, path: Path) -> None:
    """Train, and die at once when the second epoch is saved and the evaluation of the first hangs."""

    def start_stopped(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = Popen(*arguments, **options)
        if helper.__name__ in arguments[0]:
            os.kill(process.pid, signal.SIGSTOP)
            (path / "pid").write_text(str(process.pid))
        return process

    helper.subprocess.Popen = start_stopped  # type: ignore[assignment, misc]  # this process is for one test
    die_when_saved(4)
    train(recipe, RunFolder(path), BACKGROUND, world)


@pytest.fixture(scope="module")
def killed(recipe: Recipe, tmp_path_factory: Any) -> Path:
    """A run that was killed before any evaluation was done; the one that went on is gone as well."""
    path: Path = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(RankError, match="rank 0 of 1 was ended by SIGKILL"):
        run_in_ranks(train_until_killed, 1, recipe, path)
    orphan = int((path / "pid").read_text())
    assert runs(orphan)
    os.kill(orphan, signal.SIGCONT)
    wait_until(lambda: not runs(orphan))
    [out] = path.glob(".evaluation_*")
    assert [file.name for file in out.iterdir()] == [helper.TASK]  # it ended before its work was done
    (out / helper.TASK).unlink()
    (path / "pid").unlink()
    assert steps(RunFolder(path)) == [2, 4]
    return path


@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [pytest.param(FOREGROUND, id="foreground"), pytest.param(BACKGROUND, id="background", marks=pytest.mark.slow)],
)
def test_a_killed_run_that_goes_on_makes_up_for_every_evaluation(options, killed, recipe, whole, folder):
    shutil.copytree(killed, folder.path)
    assert train(recipe, folder, options, ALONE) == whole[1]
    for leftover in folder.path.glob(".evaluation_*"):
        assert options is FOREGROUND
        leftover.rmdir()
    assert_same_run(folder, whole[0])


def train_with(world: World, recipe: Recipe, path: Path, options: list[RunOptions]) -> Evaluation:
    return train(recipe, RunFolder(path), options[world.rank], world)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_on_while_the_first_ones_process_evaluates(recipe, tmp_path):
    folders = [RunFolder(tmp_path / name) for name in ("foreground", "background")]
    found = [
        run_in_ranks(train_with, 2, recipe, folder.path, [options] * 2)
        for folder, options in zip(folders, (FOREGROUND, BACKGROUND), strict=True)
    ]
    assert found[0] == found[1]
    assert found[1][0] == found[1][1]
    assert_same_run(*folders)


@pytest.mark.distributed
def test_ranks_that_do_not_agree_where_to_evaluate_are_refused(recipe, folder):
    with pytest.raises(InputError, match=r"--evaluate-in-background is True on rank 0 \(.*\), False on rank 1 \("):
        run_in_ranks(train_with, 2, recipe, folder.path, [BACKGROUND, FOREGROUND])
    assert not folder.path.exists()


def test_a_device_without_the_background_and_one_that_is_none_are_refused(recipe, folder):
    with pytest.raises(InputError, match="--evaluate-on cpu is for --evaluate-in-background"):
        train(recipe, folder, replace(FOREGROUND, evaluate_on="cpu"), ALONE)
    with pytest.raises(InputError, match="--evaluate-on tpu: choose cpu, cuda or cuda:N"):
        train(recipe, folder, replace(BACKGROUND, evaluate_on="tpu"), ALONE)
    assert not folder.path.exists()


def test_a_checkpoint_that_is_not_there_is_said_in_one_line(whole, folder):
    shutil.copytree(whole[0].path, folder.path)
    cpu = torch.device("cpu")
    with closing(BackgroundEvaluations(folder, cpu, 0, cpu)) as evaluations:
        evaluations.start(3)
        evaluations.wait(PATIENCE)
        why = f"there is no checkpoint {folder.checkpoints}/step_00000003; check the path; the training is saved"
        with pytest.raises(InputError, match=f"the evaluation of step 3 in the background failed: {why}"):
            evaluations.poll()


def test_a_processor_slow_at_bfloat16_evaluates_a_training_on_a_gpu_in_float32(recipe, pretend_speeds):
    run = replace(recipe, precision="bfloat16")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    order = pretend_speeds(float32=0.001, bfloat16=0.002)
    assert overrides_beside(run, cpu, cpu) == ({}, "")  # it computes as one in the foreground
    assert overrides_beside(recipe, cpu, cuda) == ({}, "")
    assert order == []
    overrides, figures = overrides_beside(run, cpu, cuda)
    assert overrides == {"precision": "float32"}
    assert "GFLOP/s in float32" in figures
    pretend_speeds(float32=0.002, bfloat16=0.001)
    assert overrides_beside(run, cpu, cuda) == ({}, "")


def test_the_process_computes_in_the_precision_that_it_is_told(whole, folder):
    shutil.copytree(whole[0].path, folder.path)
    cpu = torch.device("cpu")
    with closing(BackgroundEvaluations(folder, cpu, 0, cpu, {"precision": "bfloat16"})) as evaluations:
        evaluations.start(5)
        evaluations.wait(PATIENCE)
        assert evaluations.poll() is not None
    assert folder.detections.read_bytes() != whole[0].detections.read_bytes()


def test_an_evaluation_beside_an_exact_training_has_all_its_threads(folder):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with operations_on_one_thread():
            assert torch.get_num_threads() == 1
            assert BackgroundEvaluations(folder.create(), ALONE.device, 0, ALONE.device).threads == 3
    finally:
        torch.set_num_threads(before)


def test_too_little_memory_is_told_with_the_step_or_with_another_device(recipe, folder, monkeypatch, tmp_path):
    def detect(*_: object, **__: object) -> None:
        raise TooLittleMemoryError("memory does not suffice")

    monkeypatch.setattr(evaluations_module, "detect_dataset", detect)
    with pytest.raises(InputError, match=r"^the evaluation of step 2: memory does not suffice$"):
        train(recipe, folder, FOREGROUND, ALONE)
    monkeypatch.setattr(background_module, "detect_dataset", detect)
    with pytest.raises(InputError, match=r"^memory does not suffice, or choose another --evaluate-on$"):
        background_module._evaluate(folder, 2, torch.device("cpu"), 0, {}, tmp_path)
