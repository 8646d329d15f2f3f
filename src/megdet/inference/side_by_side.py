"""The images of an evaluation side by side on the threads of a CPU, every operation on one of them.

How an operation splits a sum among threads decides how it is rounded. So detections would depend on how many threads a
process has, and with it on the number of ranks. Images side by side are faster, too: two threads detect 1.3 to 1.4
times as many images of a data set a second as one forward on both (64 to 800 pixels), since what is not a large
convolution overlaps.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import TypeVar

from megdet.layers.image_team import thread_pool
from megdet.runtime import operations_on_one_thread

T = TypeVar("T")
R = TypeVar("R")
_PIXELS = 1 << 17
"""Of a share: so many that its operations are worth their start, so few that memory stays that of some images."""


def shares(num_images: int, canvas: tuple[int, int]) -> list[slice]:
    """The parts of a batch that go to threads; they depend on the batch and its canvas alone."""
    size = max(1, _PIXELS // (canvas[0] * canvas[1]))
    return [slice(first, min(first + size, num_images)) for first in range(0, num_images, size)]


def side_by_side(work: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    """The results of `work` on every item, in their order; `threads` items at a time, 0 for none but the caller's.

    The iterator must be used up or closed: until then no operation of this thread uses several threads.
    """
    if not threads:
        yield from map(work, items)
        return
    running = deque[Future[R]]()
    with operations_on_one_thread(), thread_pool(threads) as pool:
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) > 2 * threads:  # the data of more would only wait in memory
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for waiting in running:
                waiting.cancel()
