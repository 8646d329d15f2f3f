"""Rows of a sweep side by side: each job is a process with one thread that takes the next row nobody has taken.

What a job would print goes into `job-0.log`, ... in the folder of the rows.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from megdet.distributed.helper import Helper, start_helper
from megdet.distributed.world import World, start_world
from megdet.errors import InputError
from megdet.files import cannot_write, make_folder
from megdet.paper.outcome import Outcome
from megdet.paper.sweep import Train, finished_rows, outcomes_of, run_sweep
from megdet.recipe import Recipe
from megdet.training.loop import train
from megdet.training.run import RunOptions

_LOOK_SECONDS = 1.0


def run_rows(
    rows: Mapping[str, Recipe],
    folder: Path,
    options: RunOptions,
    world: World,
    *,
    chosen: Collection[str] | None = None,
    told: Callable[[str, dict[str, Outcome]], None],
    jobs: int = 1,
    train_row: Train = train,
) -> dict[str, Outcome]:
    """As `run_sweep`; with several jobs as `run_in_jobs`, which always trains by `train`."""
    if jobs > 1:
        assert train_row is train, "another function may not reach the processes of the jobs"
        return run_in_jobs(rows, folder, options, world, jobs, chosen=chosen, told=told)
    return run_sweep(rows, folder, options, world, chosen=chosen, told=told, train_row=train_row)


def run_in_jobs(
    rows: Mapping[str, Recipe],
    folder: Path,
    options: RunOptions,
    world: World,
    jobs: int,
    *,
    chosen: Collection[str] | None = None,
    told: Callable[[str, dict[str, Outcome]], None],
) -> dict[str, Outcome]:
    """As `run_sweep` on one CPU, with so many rows at a time; `told` is called after each training.

    Raises InputError as `run_sweep`, where this is one of several processes of a run, and where it is not on a CPU: the
    first job that fails stops the others, whose rows go on from their checkpoints in the next call.
    """
    if world.size > 1:
        raise InputError(
            f"--jobs {jobs}: it is for one process, this is one of {world.size}; leave out torchrun or --jobs"
        )
    if world.device.type != "cpu":
        raise InputError(f"--jobs {jobs}: it gives each row a core of the CPU; leave it out, or add --device cpu")
    known, _ = finished_rows(rows, folder, world)  # what does not compare is refused here, once
    pending = [name for name in rows if name not in known and (chosen is None or name in chosen)]
    if not pending:
        return known
    make_folder(folder)
    with ExitStack() as opened:
        started = [
            opened.enter_context(_job(number, rows, folder, options, pending))
            for number in range(min(jobs, len(pending)))
        ]
        running = list(started)
        while running:
            time.sleep(_LOOK_SECONDS)
            for helper in [helper for helper in running if helper.wait()]:
                helper.answer()
                running.remove(helper)
            found = outcomes_of(pending, folder)
            for name in [name for name in pending if name in found and name not in known]:
                known[name] = found[name]
                told(name, known)
    return outcomes_of(rows, folder)


@contextlib.contextmanager
def _job(
    number: int, rows: Mapping[str, Recipe], folder: Path, options: RunOptions, chosen: Collection[str]
) -> Iterator[Helper[None]]:
    """A job that is running; it is stopped at the end."""
    log = folder / f"job-{number}.log"
    with tempfile.TemporaryDirectory(prefix="megdet_job_") as task:
        helper = start_helper(
            _work,
            dict(rows),
            folder,
            options,
            list(chosen),
            log,
            list(sys.orig_argv),
            folder=Path(task),
            device=torch.device("cpu"),
            threads=1,
        )
        try:
            yield helper
        finally:
            helper.stop()


def _work(
    rows: dict[str, Recipe], folder: Path, options: RunOptions, chosen: list[str], log: Path, command: list[str]
) -> None:
    """What a job does: the rows one after another, as far as no other job has them.

    `command` is what the user called; the rows' environment.json names it.
    """
    sys.orig_argv[:] = command
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise cannot_write(log, error) from error
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(output, stream.fileno())
    run_sweep(rows, folder, options, start_world("cpu"), chosen=chosen, told=lambda name, _: print(name, flush=True))
