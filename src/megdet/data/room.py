"""Threads that decode images together, as many as their pixels allow."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Room:
    """Lets threads decode together images of so many pixels in all."""

    def __init__(self, pixels: int) -> None:
        self._all = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for an image; a larger one than there is room for takes it all."""
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()
