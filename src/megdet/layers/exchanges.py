"""The results of a lane's collectives in a part of a step, kept so that one rank can repeat that part alone.

The forward and backward of a micro-batch are the same each time, so the n-th collective of the second try has the
result of the n-th of the first. A rank that repeats its part reads those results here, and takes part in the
collectives that follow; the other ranks only wait longer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

_active: list["Exchanges"] = []
"""at most one in this process, not one a thread: on a GPU the backward runs in another thread"""


class Exchanges:
    """The results of collectives, in order."""

    def __init__(self) -> None:
        self._results: list[Tensor] = []
        self._next = 0

    def rewind(self) -> None:
        """Start again: the next collectives get the results kept so far."""
        self._next = 0

    def result(self, exchange: Callable[[], Tensor]) -> Tensor:
        """The result of the next collective: the kept one, or that of `exchange`, which takes part in it."""
        if self._next == len(self._results):
            self._results.append(exchange())
        self._next += 1
        return self._results[self._next - 1]


@contextmanager
def remembered(exchanges: Exchanges) -> Iterator[Exchanges]:
    """A context in which the results of a lane's collectives are kept."""
    _active.append(exchanges)
    try:
        yield exchanges
    finally:
        _active.remove(exchanges)


def exchanged(exchange: Callable[[], Tensor]) -> Tensor:
    """The result of a collective, which must not be changed in place."""
    return _active[-1].result(exchange) if _active else exchange()
