"""A limit on the pixels that threads decode at the same time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Room:
    """Lets threads decode images of at most `pixels` pixels in all at the same time."""

    def __init__(self, pixels: int) -> None:
        self._all = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for an image of so many pixels; one above the limit is decoded alone."""
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
