"""Runs a function in ranks that are real processes of this machine, without torchrun; for `verify` and for tests."""

import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from megdet.distributed.helper import how_it_ended
from megdet.distributed.parent import end_with_parent
from megdet.distributed.world import start_world, stop_world
from megdet.errors import InputError

_GRACE_SECONDS = 1.0


class RankError(RuntimeError):
    """A rank raised, died or did not end; the message names it and says why."""


def run_in_ranks(
    function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 120.0, device: str = "cpu"
) -> list[Any]:
    """Run `function(world, *arguments)` in `size` new processes that form a world; returns what each rank returned.

    Every rank has one thread. They meet in a file, so no free port is needed, and communicate by gloo, or by NCCL where
    `device` is cuda, which needs a GPU for each rank.

    Args:
        function: defined at the top of a module, so that it can be pickled.
        size: number of ranks.
        arguments: the same for every rank; pickled.
        timeout: seconds until all ranks must have ended.
        device: cpu or cuda.

    Raises:
        InputError: a rank raised it; the message is the same.
        RankError: a rank raised anything else, died, or exceeded the timeout. The others are stopped.
    """
    context = get_context("forkserver")
    # the fork server imports these modules once, for all ranks
    context.set_forkserver_preload(sorted(name for name in sys.modules if name.split(".")[0] == "megdet"))
    with tempfile.TemporaryDirectory(prefix="megdet_ranks_") as name:
        folder = Path(name)
        task = _Task(function, arguments, size, folder, device, timeout, dict(os.environ))
        processes = [context.Process(target=_run_rank, args=(task, rank)) for rank in range(size)]
        try:
            for process in processes:
                process.start()
            _wait_for(processes, folder, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
        return [torch.load(_result_file(folder, rank), weights_only=False) for rank in range(size)]


@dataclass(frozen=True)
class _Task:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    size: int
    folder: Path
    device: str
    timeout: float
    environment: dict[str, str]
    """environment of the caller: a fork server started earlier has an older one"""


def _run_rank(task: _Task, rank: int) -> None:
    end_with_parent()
    try:
        torch.set_num_threads(1)
        size = str(task.size)
        os.environ.clear()
        os.environ.update(task.environment)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        is_cuda = task.device == "cuda"
        if task.size > 1:  # start_world uses an existing process group
            distributed.init_process_group(
                "nccl" if is_cuda else "gloo",
                init_method=f"file://{task.folder}/meet",
                rank=rank,
                world_size=task.size,
                timeout=timedelta(seconds=task.timeout),
                device_id=torch.device("cuda", rank) if is_cuda else None,
            )
            distributed.barrier()  # a rank that has nothing to do must not leave before all have met
        result = task.function(start_world(task.device), *task.arguments)
        torch.save(result, _result_file(task.folder, rank))
        stop_world()
    except BaseException as error:
        _note_failure(task.folder, rank, error)
        os._exit(1)  # leaving the group in order could hang after the loss of a rank


def _result_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.pt"


def _failure_file(folder: Path, rank: int) -> Path:
    return folder / f"failed{rank}"


def _note_failure(folder: Path, rank: int, error: BaseException) -> None:
    message = str(error) if isinstance(error, InputError) else None
    note = (time.monotonic_ns(), rank, message, traceback.format_exc().strip())
    unfinished = folder / f"failing{rank}"
    unfinished.write_bytes(pickle.dumps(note))
    unfinished.rename(_failure_file(folder, rank))


def _wait_for(processes: Sequence[BaseProcess], folder: Path, timeout: float) -> None:
    """Return when all processes have ended with success; raise as soon as one has failed."""
    deadline = time.monotonic() + timeout
    running = dict(enumerate(processes))
    while running:
        ended = wait([process.sentinel for process in running.values()], max(0.0, deadline - time.monotonic()))
        if not ended:
            ranks = ", ".join(map(str, running))
            raise RankError(f"rank {ranks} of {len(processes)} did not end within {timeout:g} seconds")
        for rank, process in list(running.items()):
            if process.sentinel in ended:
                process.join()
                del running[rank]
        if any(process.exitcode for rank, process in enumerate(processes) if rank not in running):
            # a killed rank may be noticed after the ranks that lost it
            grace = time.monotonic() + _GRACE_SECONDS
            while _silent(processes, folder) is None and any(process.is_alive() for process in processes):
                if not wait(
                    [process.sentinel for process in processes if process.is_alive()], grace - time.monotonic()
                ):
                    break
            _raise_first(processes, folder)


def _silent(processes: Sequence[BaseProcess], folder: Path) -> int | None:
    """A rank that failed without a message, if there is one: the other failures follow from it."""
    bad = (rank for rank, process in enumerate(processes) if process.exitcode)
    return next((rank for rank in bad if not _failure_file(folder, rank).exists()), None)


def _raise_first(processes: Sequence[BaseProcess], folder: Path) -> None:
    """Raise for the rank that failed first: the others fail later, because they waited for it."""
    rank = _silent(processes, folder)
    if rank is not None:
        raise RankError(f"rank {rank} of {len(processes)} {how_it_ended(processes[rank].exitcode or 0)}")
    _, rank, message, text = min(pickle.loads(file.read_bytes()) for file in folder.glob("failed*"))
    if message is not None:
        raise InputError(message)
    raise RankError(f"rank {rank} of {len(processes)} failed: {text.splitlines()[-1]}\n{text}")
