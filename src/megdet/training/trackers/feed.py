"""A tracker that is fed by a thread of its own: a slow network holds up no step, a failure stops no run."""

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

from megdet.training.trackers.tracker import Tracker

_MOST_WAITING = 10_000
"""Calls that may wait for a tracker; a tracker with more calls waiting is given up."""


class Feed:
    """Calls a tracker's methods one after the other, in a thread of its own.

    Args:
        name: the name of the tracker.
        tracker: an open tracker; nobody else may call it.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.failure = ""
        """why the tracker is given up; nothing is sent after that"""
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def give(self, call: Callable[[], None]) -> None:
        """Make this call after the calls given before."""
        if not self.failure and self._calls.qsize() >= _MOST_WAITING:
            self.failure = f"{_MOST_WAITING} calls wait for it"
        if not self.failure:
            self._calls.put(call)

    def end(self, seconds: float) -> None:
        """Close the tracker and wait for it, at most so long."""
        self.give(self.tracker.close)
        self._calls.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive() and not self.failure:
            self.failure = f"it has not taken everything after {seconds:.0f} s"

    def _work(self) -> None:
        while (call := self._calls.get()) is not None and not self.failure:
            try:
                call()
            except Exception as error:  # another library may raise anything; it is reported once
                self.failure = f"{type(error).__name__}: {error}"
                return
