"""`megdet chaos`: real processes that are killed, and each part of it on what it must see and must not pass."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_runs import OVERRIDES, make_data
from megdet.contract.chaos import command as command_module
from megdet.contract.chaos.chaos import chaos
from megdet.contract.chaos.command import Command, command_line
from megdet.contract.chaos.comparison import compare
from megdet.contract.chaos.disturbances import disturbances
from megdet.contract.chaos.findings import Disturbed, Findings, Finished
from megdet.contract.chaos.processes import processes_of, targets_of
from megdet.contract.chaos.progress import Watched
from megdet.errors import InputError
from megdet.files import write_text_atomically
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe
from megdet.run_folder.checkpoint_files import save_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter
from small_runs import run_state

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="chaos reads /proc")
SLEEP = "import time; time.sleep(60)"


def test_a_seed_draws_the_same_disturbances_of_every_kind() -> None:
    first, again, other = (list(islice(disturbances(seed, (1, 2, 3)), 50)) for seed in (0, 0, 1))
    assert first == again != other
    assert {own.moment for own in first} == {"loading", "stepping", "saving", "evaluating"}
    assert {own.role for own in first} == {"rank", "worker", "helper", "launcher"}
    assert {own.how for own in first} == {"SIGKILL", "SIGTERM", "SIGSTOP", "pause"}
    assert {own.devices for own in first} == {1, 2, 3}
    assert not any((own.role, own.how) == ("launcher", "SIGSTOP") for own in islice(disturbances(0, (2,)), 1000))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Command]]:
    """Starts a program in the place of `megdet train`; all are ended afterwards."""
    monkeypatch.setattr(command_module, "command_line", lambda words, _: [sys.executable, *words])
    started: list[Command] = []

    def start(program: str) -> Command:
        file = tmp_path / f"program{len(started)}.py"
        file.write_text(program)
        started.append(Command([str(file)], 1, f"test{os.getpid()}_{len(started)}", tmp_path / f"{len(started)}.log"))
        return started[-1]

    yield start
    for own in started:
        own.close()


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_processes_of_a_command_are_found_with_what_they_do(command: Any, tmp_path: Path) -> None:
    sleeping = tmp_path / "sleeping.py"
    sleeping.write_text(SLEEP)
    own = command(f"""
import subprocess, sys, time
for words in (["{sleeping}"], ["{sleeping}", "megdet.distributed.helper"], ["-c", "{SLEEP}"]):
    subprocess.Popen([sys.executable, *words])
time.sleep(60)
""")
    wait_until(lambda: len(processes_of(own.mark)) == 4 and len(own.targets()) == 3)
    roles = {target.role: target for target in own.targets()}
    assert set(roles) == {"rank", "worker", "helper"}
    assert roles["worker"].parent == roles["helper"].parent == roles["rank"].pid
    assert roles["worker"].send(signal.SIGKILL)
    wait_until(lambda: len(own.targets()) == 2)
    assert not targets_of("another mark", roles["rank"].pid)


def test_under_torchrun_its_children_are_the_ranks(command: Any, tmp_path: Path) -> None:
    sleeping = tmp_path / "sleeping.py"
    sleeping.write_text(SLEEP)
    own = command(f"""
import os, sys
launch = "import subprocess, sys, time; [subprocess.Popen([sys.executable, {str(sleeping)!r}]) for _ in '12']; {SLEEP}"
os.execv(sys.executable, [sys.executable, "-c", launch, "torch.distributed.run"])
""")
    wait_until(lambda: sorted(target.role for target in own.targets()) == ["launcher", "rank", "rank"])
    assert command_line(["train", "demo"], 2)[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    assert command_line(["train", "demo"], 1)[1:] == ["-m", "megdet", "train", "demo"]


def test_a_process_that_outlives_its_command_is_an_orphan(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module, "ORPHAN_SECONDS", 0.3)
    own = command(f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}, 'left'])")
    wait_until(lambda: own.code == 0)
    (orphan,) = own.orphans()
    assert orphan.endswith("left")
    own.close()
    assert not processes_of(own.mark)
    assert not command("print('in order')").orphans()


def test_a_traceback_of_ours_is_found_and_that_of_torchrun_is_none(command: Any) -> None:
    ours = command("from megdet.distributed.layout import choose_layout\nchoose_layout('a', 'b', 'c')")
    theirs = command("import subprocess; subprocess.run(['false'], check=True)")
    wait_until(lambda: None not in (ours.code, theirs.code))
    assert "Error" in ours.traceback()
    assert not theirs.traceback()
    assert "CalledProcessError" in theirs.last_line()


def a_run(
    folder: Path, *, weight: float = 1.0, evaluations: tuple[int, ...] = (2,), steps: tuple[int, ...] = (1, 2)
) -> Any:
    """A run folder at step 2 with one weight."""
    run = RunFolder(folder).create()
    tensors: Any = {"model": {"w": torch.tensor([weight, 2.0], dtype=torch.float64)}, "optimizer": {}}
    save_checkpoint(run, run_state(2), tensors, keep=1)
    run.metrics.unlink(missing_ok=True)
    with MetricsWriter(run.metrics) as metrics:
        for step in steps:
            metrics.write({"step": step, "loss": 0.5, "seconds": time.monotonic()})
        for step in evaluations:
            metrics.write({"step": step, "evaluation": {"bbox": {"AP": 0.5}}})
    run.detections.write_text("[]")
    return run


def test_runs_that_differ_by_their_times_alone_are_the_same(tmp_path: Path) -> None:
    for is_bitwise in (True, False):
        assert compare(a_run(tmp_path / "a"), a_run(tmp_path / "b"), is_bitwise=is_bitwise) == (0.0, [])


@pytest.mark.parametrize(("change", "across"), [(1e-12, True), (1e-6, False)])
def test_a_changed_bit_fails_on_one_layout_and_a_changed_billionth_on_several(
    tmp_path: Path, change: float, across: bool
) -> None:
    ours, theirs = a_run(tmp_path / "a"), a_run(tmp_path / "b", weight=1 + change)
    worst, faults = compare(ours, theirs, is_bitwise=True)
    assert worst == pytest.approx(change / 2, rel=1e-3)
    assert faults[0].startswith("other SHA-256 of model: model.w differs by")
    assert (compare(ours, theirs, is_bitwise=False)[1] == []) == across


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"steps": (1,)}, "loss"),
        ({"steps": (1, 2, 2)}, "loss"),
        ({"evaluations": (2, 2)}, "evaluation"),
        ({"evaluations": ()}, "evaluation"),
    ],
)
def test_a_line_that_is_missing_or_there_twice_is_a_fault(tmp_path: Path, how: Any, kind: str) -> None:
    for is_bitwise in (True, False):
        _, (fault,) = compare(a_run(tmp_path / "a"), a_run(tmp_path / "b", **how), is_bitwise=is_bitwise)
        assert fault.startswith(f"the lines of `{kind}` in metrics.jsonl are of other steps: [2]")


def test_what_a_run_does_is_seen_from_its_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    recipe = load_recipe("verify", {"evaluation.every_epochs": "2"})
    watched = Watched(folder, recipe, 3)
    assert (watched.now().activity, watched.saved_step()) == ("loading", 0)
    a_run(folder.path, evaluations=())
    assert watched.now().activity == "loading", "the lines are of an earlier start"
    write_text_atomically(folder.environment, json.dumps({"sessions": [{}]}))
    assert (watched.now().activity, watched.now().step, watched.saved_step()) == ("stepping", 2, 2)
    for epoch, activity in ((1, "stepping"), (2, "evaluating"), (3, "evaluating")):
        with MetricsWriter(folder.metrics, 2) as metrics:
            metrics.write({"step": 2, "epoch_means": {"epoch": epoch}})
        assert watched.now().activity == activity
    (folder.checkpoints / ".unfinished_step_00000003").mkdir()
    assert watched.now().activity == "saving"


def test_only_runs_without_a_fault_pass() -> None:
    done = Disturbed(1, 1, 2, "SIGKILL", "rank", 77, "saving", 12, 1, 3.25, 2)
    good, bad = Finished(1, 3, 0.0, ()), Finished(2, 3, 0.1, ("model.w differs by 0.1",))
    findings = Findings(True, 0, disturbed=[done], finished=[good])
    assert findings.sentence() == (
        "pass: 1 disturbances in 1 run(s), all with the SHA-256 of the undisturbed run; 2 steps were made again; the "
        "slowest end took 3.2 s"
    )
    assert done.sentence() == (
        "SIGKILL to a rank (saving, step 12, 2 ranks): ended with 1 after 3.2 s, 2 steps are made again"
    )
    assert json.loads(json.dumps(findings.as_dict(), allow_nan=False))["pass"] is True
    assert not Findings(True, 0).passes, "nothing was shown"
    assert not Findings(True, 0, finished=[good], faults=["a hang"]).passes
    assert Findings(True, 0, finished=[good, bad]).sentence().startswith("fail: run 2: model.w differs by 0.1;")


def tiny(folder: Path, **changes: str) -> Recipe:
    """24 steps, a checkpoint after every other, an evaluation after every third."""
    data = make_data(folder)
    words = [*data.options, *OVERRIDES[: OVERRIDES.index("--workers")]]
    keys = {key[2:]: value for key, value in zip(words[::2], words[1::2], strict=True)}
    small = {"model.backbone.name": "test_resnet", "schedule.epochs": "8", "checkpoint_steps": "2"}
    return load_recipe("demo", {**keys, **small, **changes})


def test_a_recipe_that_does_not_train_is_refused_with_its_reason(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, **{"model.backbone.weights": str(tmp_path / "no_such_file")})
    with pytest.raises(InputError, match=r"^the undisturbed run failed: megdet: .*no_such_file"):
        chaos(recipe, 1, (1,))


def test_it_starts_its_processes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="run it without torchrun"):
        chaos(load_recipe("verify"), 1)


@pytest.mark.slow
@pytest.mark.distributed
def test_fifty_kills_on_two_ranks_leave_the_weights_of_the_undisturbed_run(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--workers", "1", "--evaluate-in-background"]
    findings = chaos(tiny(tmp_path), 50, (2,), options=options, progress=print)
    assert findings.passes, findings.sentence()
    assert len(findings.disturbed) == 50
    assert {run.difference for run in findings.finished} == {0.0}
    assert {own.activity for own in findings.disturbed} >= {"loading", "saving", "evaluating"}


@pytest.mark.slow
@pytest.mark.distributed
def test_kills_on_changing_numbers_of_ranks_leave_its_weights_to_rounding(tmp_path: Path) -> None:
    findings = chaos(tiny(tmp_path), 10, (1, 2, 3), seed=3, options=["--device", "cpu", "--workers", "1"])
    assert findings.passes, findings.sentence()
    assert len({own.devices for own in findings.disturbed}) > 1
    assert max(run.difference for run in findings.finished) < 1e-9


@pytest.mark.slow
@pytest.mark.distributed
def test_kills_on_changing_numbers_of_ranks_leave_every_bit_of_an_exact_run(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, exact="true")
    findings = chaos(recipe, 10, (1, 2, 3), seed=3, options=["--device", "cpu", "--workers", "1"])
    assert findings.passes, findings.sentence()
    assert findings.is_bitwise
    assert len({own.devices for own in findings.disturbed}) > 1
    assert recipe.precision == "float32"
