"""A run of 2,000 steps, with checkpoints and evaluations, watched from outside: nothing of it grows."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from megdet.recipe_file import dump_recipe
from small_runs import small_recipe, write_small_sets

STEPS = 2000


class Seen(NamedTuple):
    """What a process and its children have."""

    step: int
    resident: float
    """MiB"""
    descriptors: int
    threads: int
    processes: int


def look(process: int, metrics: Path) -> Seen | None:
    """None while it makes no steps, and where it has just ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        descriptors = len(os.listdir(f"/proc/{process}/fd"))  # noqa: PTH208 (a file may be gone)
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        lines = metrics.read_bytes().splitlines()
        step = max((json.loads(line)["step"] for line in lines[-3:-1]), default=0)
        resident = int(status["VmRSS"].split()[0])  # what has ended has none
    except (OSError, ValueError, KeyError):
        return None
    return Seen(step, resident / 1024, descriptors, int(status["Threads"]), len(children))


def middle(seen: Sequence[Seen], first: int, last: int) -> Seen:
    """The medians between two steps."""
    own = [one for one in seen if first <= one.step <= last]
    assert len(own) >= 5
    memory, *counts = (statistics.median(column) for column in list(zip(*own, strict=True))[1:])
    return Seen(last, memory, *map(int, counts))


@pytest.mark.slow
def test_two_thousand_steps_leave_no_growth_of_memory_descriptors_threads_or_processes(tmp_path):
    recipe = small_recipe(write_small_sets(tmp_path))
    recipe = replace(
        recipe,
        checkpoint_steps=50,
        checkpoint_epochs=10_000,
        schedule=replace(recipe.schedule, epochs=STEPS * recipe.batch_size / 13),
        evaluation=replace(recipe.evaluation, every_epochs=150),
    )
    file, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "megdet", "train", str(file), "--run", str(folder), "--workers", "1"]
    seen: list[Seen] = []
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(command, stderr=said, stdout=said)
        while run.poll() is None:
            time.sleep(0.25)
            if (one := look(run.pid, folder / "metrics.jsonl")) is not None:
                seen.append(one)
    assert run.returncode == 0, (tmp_path / "said").read_text()
    early, late = middle(seen, 400, 700), middle(seen, STEPS - 300, STEPS)
    print(f"\nearly {early}\nlate  {late}")
    assert late.resident - early.resident < 20
    assert late[2:] == early[2:]
