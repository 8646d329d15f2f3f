"""What loading processes hand over, waited for with patience that ends.

A batch travels in shared memory. Where that has no room for it, as in a container with 64 MB of it, the batch goes
through the pipe that otherwise carries its address. A process that was killed is named, and one that hangs is not
waited for without end.
"""

import multiprocessing
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, get_worker_info

from megdet.distributed.parent import end_with_parent
from megdet.distributed.termination import blocked_signals, end_by_parent_only
from megdet.errors import InputError
from megdet.structures import Batch

LOOK_SECONDS = 5.0
"""Between two looks at the loading processes while a batch is waited for."""
LONGEST_WAIT = 600.0
"""Seconds after which a batch is given up; an image takes a fraction of one."""

_DYING_SECONDS = 1.0
_SHARED_MEMORY = Path("/dev/shm")
_KEPT_FREE = 2.0
"""Batches for which there must be room before one is put there: others fill it at the same time."""


class Loaded(NamedTuple):
    """What a loading process hands over: a batch or why there is none, and what the user should know."""

    batch: Batch | InputError
    notices: list[str]


class Pickled(NamedTuple):
    """The same in bytes."""

    loaded: bytes


def handed_over(batch: Batch, notices: list[str]) -> Loaded | Pickled:
    """A batch on its way from this process to the training, which may be the same process."""
    if get_worker_info() is None:
        return Loaded(batch, notices)
    if _has_room(sum(tensor.nbytes for tensor in batch.tensors())):
        try:
            for tensor in batch.tensors():
                tensor.share_memory_()  # type: ignore[no-untyped-call]
        except RuntimeError:  # another process was quicker
            pass
        else:
            return Loaded(batch, notices)
    total = shutil.disk_usage(_SHARED_MEMORY).total / 1e6 if _SHARED_MEMORY.exists() else 0.0
    slow = (
        f"the shared memory ({_SHARED_MEMORY}, {total:.0f} MB) has no room for the batches that loading processes keep "
        "ready: they go through pipes, which takes longer; a container is given more with --shm-size, for example 8g"
    )
    return Pickled(pickle.dumps(Loaded(batch, [*notices, slow]), pickle.HIGHEST_PROTOCOL))


def received(loader: "DataLoader[Any]") -> Iterator[Loaded]:
    """The items of a loader whose timeout is LOOK_SECONDS, where it has processes.

    Raises InputError where a process was killed, or where nothing comes for LONGEST_WAIT.
    """
    before = set(multiprocessing.active_children())
    handler = signal.getsignal(signal.SIGCHLD)
    with blocked_signals():
        items = iter(loader)
    processes = [process for process in multiprocessing.active_children() if process not in before]
    if threading.current_thread() is threading.main_thread():
        # torch's own handler raises wherever the training happens to be; here a dead process is noticed in its turn
        signal.signal(signal.SIGCHLD, handler)
    while True:
        try:
            item = _next(items, processes)
        except StopIteration:
            return
        yield pickle.loads(item.loaded) if isinstance(item, Pickled) else item


def prepare_process(_number: int) -> None:
    """Let a process that loads images live on when a signal reaches the whole run, and end with its loader."""
    end_by_parent_only()
    end_with_parent()


def _next(items: Iterator[Any], processes: list[BaseProcess]) -> Loaded | Pickled:
    started = time.monotonic()
    while True:
        try:
            item: Loaded | Pickled = next(items)
            return item
        except (RuntimeError, OSError, EOFError) as error:
            is_late = isinstance(error, RuntimeError) and "timed out" in str(error)
            if not is_late:  # a process that is just dying may have caused it
                wait([process.sentinel for process in processes], _DYING_SECONDS)
            _refuse_the_dead(processes)
            if not is_late:
                raise
            if time.monotonic() - started > LONGEST_WAIT:
                raise InputError(
                    f"no batch has come from the loading processes for {LONGEST_WAIT:g} seconds, though they live: "
                    "does the disk or the network folder of the images answer?"
                ) from None


def _refuse_the_dead(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(0)
        if process.exitcode:
            code = process.exitcode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise InputError(
                f"process {process.pid}, which loads images, {how}: if memory is short, fewer --workers take less; the "
                "same command goes on from the last checkpoint"
            )


def _has_room(num_bytes: int) -> bool:
    """Whether the shared memory, if it is a folder, has room for a batch of so many bytes."""
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free >= _KEPT_FREE * num_bytes
    except OSError:
        return True
