"""Batches from loading processes, some of which may be killed or hang.

A batch travels in shared memory. If that has no room, as in a container with 64 MB of it, the batch goes through the
pipe that otherwise carries its address. If a process was killed, all are started again and load the batches that had
not arrived: a batch depends only on its place in the order. A process that hangs is given up after `LONGEST_WAIT`.
"""

import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch.utils.data import DataLoader, get_worker_info

from megdet.data.unreadable import Replaced
from megdet.distributed.parent import end_with_parent
from megdet.distributed.termination import blocked_signals, end_by_parent_only
from megdet.errors import InputError
from megdet.structures import Batch

LOOK_SECONDS = 5.0
"""Seconds between two checks of the loading processes while a batch is waited for."""
LONGEST_WAIT = 600.0
"""Seconds after which a batch is given up; an image takes a fraction of a second."""
RESTARTS_IN_A_ROW = 3
"""Restarts of the loading processes in a row without a batch."""
MOST_RESTARTS = 30
"""Restarts of the loading processes in all: if more die, the machine has another problem."""

_DYING_SECONDS = 10.0
_SHARED_MEMORY = Path("/dev/shm")
_KEPT_FREE = 2.0
"""Batches for which shared memory must have room before one is put there: other processes fill it too."""


class Loaded(NamedTuple):
    """What a loading process hands over: a batch or why there is none, and what the user should know."""

    batch: Batch | InputError
    notices: list[str]
    replaced: Sequence[Replaced] = ()
    """images of the batch that could not be read"""


class Pickled(NamedTuple):
    """A pickled `Loaded`, for the pipe."""

    loaded: bytes


class _DeadProcessError(Exception):
    """A loading process was killed; the message is the beginning of a sentence."""


def handed_over(batch: Batch, notices: list[str], replaced: list[Replaced]) -> Loaded | Pickled:
    """A batch in the form in which this process sends it to the training, which may be the same process."""
    if get_worker_info() is None:
        return Loaded(batch, notices, replaced)
    if _has_room(sum(tensor.nbytes for tensor in batch.tensors())):
        try:
            for tensor in batch.tensors():
                tensor.share_memory_()  # type: ignore[no-untyped-call]
        except RuntimeError:  # another process took the room
            pass
        else:
            return Loaded(batch, notices, replaced)
    total = shutil.disk_usage(_SHARED_MEMORY).total / 1e6 if _SHARED_MEMORY.exists() else 0.0
    slow = (
        f"the shared memory ({_SHARED_MEMORY}, {total:.0f} MB) has no room for the batches that loading processes keep "
        "ready: they go through pipes, which is slower; give a container more with --shm-size, for example 8g"
    )
    return Pickled(pickle.dumps(Loaded(batch, [*notices, slow], replaced), pickle.HIGHEST_PROTOCOL))


def received(loader_from: "Callable[[int], DataLoader[Any]]", restarted: Callable[[str], None]) -> Iterator[Loaded]:
    """The items of a loader in their order, also if some of its processes are killed.

    `loader_from(n)` makes a loader of all items but the first n; with processes its timeout is LOOK_SECONDS.
    `restarted` is called with a sentence about each restart of the processes.

    Raises InputError after too many restarts, or if no item comes for LONGEST_WAIT.
    """
    done, restarts, in_a_row = 0, 0, 0
    while True:
        try:
            for item in _items(loader_from(done)):
                done, in_a_row = done + 1, 0
                yield item
        except _DeadProcessError as death:
            restarts, in_a_row = restarts + 1, in_a_row + 1
            if in_a_row > RESTARTS_IN_A_ROW or restarts > MOST_RESTARTS:
                raise InputError(
                    f"{death}, and loading was started anew {restarts - 1} times before: if memory is short, give "
                    "fewer --workers; the same command goes on from the last checkpoint"
                ) from None
            restarted(f"{death}: its batches are loaded again by a new one")
        else:
            return


def _items(loader: "DataLoader[Any]") -> Iterator[Loaded]:
    """The items of one loader. Raises _DeadProcessError where one of its processes was killed."""
    handler = signal.getsignal(signal.SIGCHLD)
    with blocked_signals():
        items: Any = iter(loader)
    # all of them: multiprocessing.active_children() would leave out one that has died since
    processes = list(items._workers) if loader.num_workers else []
    if threading.current_thread() is threading.main_thread():
        # torch's own handler would raise anywhere in the training; here a dead process is noticed when it is its turn
        signal.signal(signal.SIGCHLD, handler)
    while True:
        try:
            item = _next(items, processes)
        except StopIteration:
            return
        except _DeadProcessError:
            for process in processes:  # a dead process may hold a lock that the others wait for
                process.kill()
            raise
        yield pickle.loads(item.loaded) if isinstance(item, Pickled) else item


def prepare_process(_number: int) -> None:
    """Let a loading process ignore signals that reach the whole run, and end with its loader."""
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
            if not is_late:  # the cause may be a process that is dying just now
                wait([process.sentinel for process in processes], _DYING_SECONDS)
            if dead := next((process for process in processes if _has_died(process)), None):
                _raise_death(dead)
            if not is_late:
                raise
            if time.monotonic() - started > LONGEST_WAIT:
                raise InputError(
                    f"no batch has come from the loading processes for {LONGEST_WAIT:g} seconds, though they live: "
                    "does the disk or the network folder of the images answer?"
                ) from None


def _has_died(process: BaseProcess) -> bool:
    # a killed process closes its files, which wakes those that wait for it, and is gone a moment later: join waits
    # for that moment, but not with a timeout of 0
    process.join(0.001)
    return bool(process.exitcode)


def _raise_death(process: BaseProcess) -> NoReturn:
    code = process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise _DeadProcessError(f"process {process.pid}, which loads images, {how}") from None


def _has_room(num_bytes: int) -> bool:
    """Whether the shared memory, if it is a folder, has room for a batch of so many bytes."""
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free >= _KEPT_FREE * num_bytes
    except OSError:
        return True
