"""The images of an evaluation side by side on the threads of a CPU, every operation on one of them.

How an operation splits a sum among threads decides how it is rounded. So detections would depend on how many threads a
process has, and with it on the number of ranks. Images side by side are faster, too: two threads detect 1.3 to 1.4
times as many images of a data set a second as one forward on both (64 to 800 pixels), since what is not a large
convolution overlaps.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, BrokenBarrierError, Event
from typing import Any, TypeVar

import torch
from torch import nn

from megdet.runtime import usable_threads

T = TypeVar("T")
R = TypeVar("R")
_LOCAL = threading.local()
"""`stop` of a thread of the pool: set when nobody waits for its item any more."""
_BEGINNING = threading.Lock()
_PIXELS = 1 << 17
"""Of a share: so many that its operations are worth their start, so few that memory stays that of some images."""


def shares(num_images: int, canvas: tuple[int, int]) -> list[slice]:
    """The parts of a batch that go to threads; they depend on the batch and its canvas alone."""
    size = max(1, _PIXELS // (canvas[0] * canvas[1]))
    return [slice(first, min(first + size, num_images)) for first in range(0, num_images, size)]


def threads_for(canvas: tuple[int, int], batch_size: int) -> int:
    """How many threads compute shares of this canvas or smaller ones at a time.

    All of the process's; but where a share is one large image, no more than `batch_size`, since each takes the memory
    of a forward.
    """
    most = usable_threads()
    return most if canvas[0] * canvas[1] <= _PIXELS else min(most, batch_size)


def side_by_side(work: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    """The results of `work` on every item, in their order; `threads` items at a time, 0 for none but the caller's.

    The iterator must be used up or closed. Where it is closed early, by an error or Ctrl-C, items in work are given up
    at the next layer of a network that is computed within `given_up_early`.
    """
    if not threads:
        yield from map(work, items)
        return
    running, stop = deque[Future[R]](), Event()

    def worked(item: T) -> R:
        _LOCAL.stop = stop
        return work(item)

    items = iter(items)
    first = list(itertools.islice(items, 1))  # before there are threads: it may fork loading processes
    with _threads(threads) as pool:
        try:
            for item in itertools.chain(first, items):
                running.append(pool.submit(worked, item))
                if len(running) > 2 * threads:  # the data of more would only wait in memory
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            stop.set()
            for waiting in running:
                waiting.cancel()


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose operations run on one thread; the number of this thread and of later ones stays as it is."""
    have_begun, beginnings = Barrier(count + 1), list[Future[None]]()

    def begin() -> None:
        try:
            torch.zeros(1 << 17).sum()  # with a thread's first operation torch sets its number to that of the process
            torch.set_num_threads(1)
            have_begun.wait()
        except BaseException:  # without this thread the others would wait for ever
            have_begun.abort()
            raise

    with ThreadPoolExecutor(count, "megdet image") as pool:
        with _number_kept():
            try:
                beginnings += [pool.submit(begin) for _ in range(count)]
                have_begun.wait()
            except BrokenBarrierError:
                errors = [beginning.exception() for beginning in beginnings]
                raise next(own for own in errors if not isinstance(own, BrokenBarrierError | None)) from None
            except BaseException:  # Ctrl-C, or a thread could not be started
                have_begun.abort()
                raise
        yield pool


@contextmanager
def _number_kept() -> Iterator[None]:
    """Within it, threads set their numbers of threads; later threads begin with the number of now."""
    # a thread of its own, since another's number may be from the moment in which a pool began
    with _BEGINNING, ThreadPoolExecutor(1) as keeper:
        number = keeper.submit(torch.get_num_threads).result()
        try:
            yield
        finally:
            keeper.submit(torch.set_num_threads, number).result()


class _GivenUpError(Exception):
    """Nobody waits for this item any more."""


@contextmanager
def given_up_early(model: nn.Module) -> Iterator[None]:
    """Within it, every layer of a model looks first whether somebody still waits for the item of its thread."""

    def look(*_: Any) -> None:
        stop: Event | None = getattr(_LOCAL, "stop", None)
        if stop is not None and stop.is_set():
            raise _GivenUpError

    hooks = [module.register_forward_pre_hook(look) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
