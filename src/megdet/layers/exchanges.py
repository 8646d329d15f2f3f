"""What the ranks of a lane have told each other in a part of a step, so that one of them can make it again alone.

The forward and backward of a micro-batch are the same each time, so the n-th collective of the second try has the
result of the n-th of the first. A rank that begins anew reads those results here, and takes part in the collectives
that follow; the other ranks notice nothing but the wait.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

_active: list["Exchanges"] = []
"""of this process, at most one: on a GPU the backward runs in another thread"""


class Exchanges:
    """The results of collectives in their order."""

    def __init__(self) -> None:
        self._results: list[Tensor] = []
        self._next = 0

    def rewind(self) -> None:
        """Begin anew: the results so far come again."""
        self._next = 0

    def result(self, exchange: Callable[[], Tensor]) -> Tensor:
        """That of the next collective; `exchange` takes part in it, unless it is known."""
        if self._next == len(self._results):
            self._results.append(exchange())
        self._next += 1
        return self._results[self._next - 1]


@contextmanager
def remembered(exchanges: Exchanges) -> Iterator[Exchanges]:
    """Within it, the results of a lane's collectives are remembered."""
    _active.append(exchanges)
    try:
        yield exchanges
    finally:
        _active.remove(exchanges)


def exchanged(exchange: Callable[[], Tensor]) -> Tensor:
    """The result of a collective, which must not be changed in place."""
    return _active[-1].result(exchange) if _active else exchange()
