"""Work in a process beside this one: what comes back, and that no process is left behind, however things end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helper_tasks import add, die, end, go_on, have_a_bug, not_picklable, refuse
from megdet.distributed.helper import Helper, HelperEndedError, HelperError, answers_of, start_helper
from megdet.distributed.world import World, start_world
from megdet.errors import DivergedError, InputError

CPU = torch.device("cpu")
PATIENCE = 60.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """`start_helper` with a folder of its own for each helper."""
    started: list[Helper[Any]] = []

    def start_one(function: Any, *arguments: Any, device: torch.device = CPU, **options: Any) -> Helper[Any]:
        folder = tmp_path / f"helper{len(started)}"
        folder.mkdir()
        started.append(start_helper(function, *arguments, folder=folder, device=device, **options))
        return started[-1]

    yield start_one
    for helper in started:
        helper.stop()


def is_alive(pid: int) -> bool:
    """Whether a process goes on; one that ended and that nobody asked for its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + PATIENCE
    while is_alive(pid):
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.05)


def number_in(file: Path) -> int:
    end = time.monotonic() + PATIENCE
    while not file.exists() or not file.read_text():
        assert time.monotonic() < end, "nobody wrote it"
        time.sleep(0.05)
    return int(file.read_text())


def surroundings() -> tuple[World, int, int, str]:
    return start_world("cpu"), torch.get_num_threads(), os.nice(0), os.environ["LOCAL_RANK"]


def test_a_helper_answers_from_a_process_of_its_own(start):
    helpers = [start(add, 2, 3), start(os.getpid)]
    assert answers_of(helpers) == [5, helpers[1].process.pid]
    assert helpers[0].answer() == 5
    assert helpers[0].wait()


def test_a_helper_is_alone_on_its_device_whatever_rank_started_it(start, monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    world, threads, niceness, local_rank = start(
        surroundings, device=torch.device("cuda", 6), threads=3, niceness=2
    ).answer()
    assert (world.rank, world.size, threads, local_rank) == (0, 1, 3, "6")
    assert niceness == min(19, os.nice(0) + 2)


def test_what_the_user_can_mend_comes_back_as_it_is(start):
    with pytest.raises(DivergedError, match="step 3: loss is not finite"):
        start(refuse).answer()


@pytest.mark.parametrize(
    ("function", "arguments", "kind", "words"),
    [
        (have_a_bug, (), HelperError, r"^ValueError: no such thing$"),
        (not_picklable, (), HelperError, "pickle"),
        (end, (3,), HelperEndedError, "^its process ended with exit code 3 and said no more than the lines above$"),
        (end, (0,), HelperEndedError, "^its process ended with exit code 0"),
        (die, (signal.SIGKILL,), HelperEndedError, r"^its process was ended by SIGKILL \(out of memory\?\)$"),
    ],
    ids=["a bug", "an answer that cannot be pickled", "a bad end", "an end without a word", "killed"],
)
def test_a_helper_that_fails_says_how(function, arguments, kind, words, start):
    helper = start(function, *arguments)
    with pytest.raises(HelperError, match=words) as raised:
        helper.answer()
    assert type(raised.value) is kind


def test_waiting_has_an_end_and_stopping_ends_its_processes_too(start, tmp_path):
    helper = start(go_on, tmp_path / "pid")
    child = number_in(tmp_path / "pid")
    assert not helper.wait(0.01)
    helper.stop()
    assert helper.wait()
    wait_until_gone(child)
    helper.stop()  # once more is no harm


def test_of_helpers_that_work_together_the_first_that_fails_stops_the_others(start):
    helpers = [start(go_on), start(refuse), start(go_on)]
    with pytest.raises(InputError, match="loss is not finite"):
        answers_of(helpers)
    assert [helper.process.returncode for helper in helpers] == [-signal.SIGKILL, 0, -signal.SIGKILL]


START = """
import os, signal, sys, time
from pathlib import Path
import torch
from megdet.distributed.helper import start_helper
import helper_tasks
folder = Path(sys.argv[1])
helper = start_helper(helper_tasks.go_on, folder / "pid", folder=folder, device=torch.device("cpu"))
(folder / "helper").write_text(str(helper.process.pid))
time.sleep(3600)
"""


def test_a_helper_ends_with_the_process_that_started_it_also_where_that_was_killed(tmp_path):
    path = os.pathsep.join(sys.path)
    parent = subprocess.Popen([sys.executable, "-c", START, str(tmp_path)], env={**os.environ, "PYTHONPATH": path})
    try:
        pids = [number_in(tmp_path / name) for name in ("helper", "pid")]
        assert all(map(is_alive, pids))
    finally:
        parent.kill()
        parent.wait()
    for pid in pids:
        wait_until_gone(pid)
