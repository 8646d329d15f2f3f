"""A process ends with the one that started it, also where both had no moment to say so: real processes, killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cli_runs import OVERRIDES, make_data

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread looks twice a second")
LIMIT = 5.0
SLEEPS = (
    "import time; from megdet.distributed.parent import {name}; {name}(); print('ready', flush=True); time.sleep(60)"
)


def state_of(pid: int) -> str:
    """R, S, T (stopped), Z; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def has_ended(pid: int) -> bool:
    """Whether it ends within the limit."""
    end = time.monotonic() + LIMIT
    while state_of(pid) not in ("", "Z", "X") and time.monotonic() < end:
        time.sleep(0.02)
    return state_of(pid) in ("", "Z", "X")


def parent_of(child: str, **environment: str) -> tuple[subprocess.Popen[str], int]:
    """A process, and the one that it has started, which is ready."""
    script = f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        print(child.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def kill(parent: subprocess.Popen[str]) -> None:
    with parent:
        parent.kill()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_process_is_ended_with_its_parent_even_where_it_is_stopped(is_stopped: bool) -> None:
    parent, child = parent_of(SLEEPS.format(name="end_with_parent"))
    try:
        if is_stopped:
            os.kill(child, signal.SIGSTOP)
        assert state_of(child) not in ("", "Z")
    finally:
        kill(parent)
    assert has_ended(child)


def test_only_a_process_of_torchrun_is_ended_with_its_launcher() -> None:
    for environment, ends in (({}, False), ({"TORCHELASTIC_RUN_ID": "a"}, True)):
        parent, child = parent_of(SLEEPS.format(name="end_with_launcher"), **environment)
        kill(parent)
        if ends:
            assert has_ended(child)
        else:  # a shell that is closed after `nohup megdet train &`
            time.sleep(0.3)
            assert state_of(child) == "S"
            os.kill(child, signal.SIGKILL)


def test_a_process_whose_parent_is_gone_already_does_not_start() -> None:
    code = "from megdet.distributed.parent import end_with_parent; end_with_parent(1 << 30); print('goes on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def running_with(word: str) -> list[int]:
    """The processes with a word on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "cmdline").read_text() and state_of(int(folder.name)) not in ("", "Z"):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_torchrun_leaves_no_rank_and_no_loading_process(tmp_path: Path) -> None:
    data, run = make_data(tmp_path / "data"), tmp_path / "run"
    words = ["train", "demo", "--run", run, *data.options, *OVERRIDES, "--model.backbone.name", "test_resnet"]
    words += ["--workers", "1", "--schedule.epochs", "1000", "--checkpoint_steps", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megdet"]
    with subprocess.Popen(
        [*torchrun, "--", *map(str, words)], stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as launcher:
        try:
            end = time.monotonic() + 400
            while not (run / "metrics.jsonl").exists() and time.monotonic() < end:
                time.sleep(0.1)
            while len(of_run := running_with(str(run))) < 5 and time.monotonic() < end:
                time.sleep(0.1)
        finally:
            launcher.kill()
    assert len(of_run) >= 5, "torchrun, two ranks, two that load images"
    assert all(map(has_ended, of_run))
    assert not running_with(str(run))
