"""Sizes of far images from the first bytes of their files."""

import logging
import time

from megdet.data.far.folder import FarFile, FarFolder
from megdet.data.far.reading import reader_of
from megdet.data.image import Header, header_of_beginning
from megdet.errors import InputError

THREADS = 64
"""Requests for headers at the same time: each waits for its server nearly all of its time."""
_BEGINNINGS = (1 << 12, 1 << 16, 1 << 20, None)
"""Bytes of a file that are asked for until its header is among them; None is all of it."""
_SECONDS_BETWEEN = 10.0

_LOG = logging.getLogger(__name__)


def far_header(file: FarFile) -> Header:
    """The header of an image, as `whole_header` gives it. Raises InputError.

    Differs from a local file: an image that is cut short on its server is found when it is decoded, unless it has less
    than 4 KiB or its server does not tell parts of files.
    """
    reader = reader_of(file.folder)
    try:
        for size in _BEGINNINGS:
            content = reader.beginning(file, size)
            if header := header_of_beginning(content, is_whole=size is None or len(content) != size):
                return header
    except InputError as error:
        raise InputError(f"{file}: {str(error).removeprefix('the image: ')}") from None
    raise AssertionError("the last beginning is the whole file")


class Progress:
    """A line every ten seconds while many headers are read."""

    def __init__(self, folder: FarFolder, count: int) -> None:
        self.folder, self.count, self.done = folder, count, 0
        self.started = self.said = time.monotonic()

    def one_more(self) -> None:
        """Count a header."""
        self.done += 1
        now = time.monotonic()
        if now - self.said > _SECONDS_BETWEEN:
            self.said = now
            speed = self.done / (now - self.started)
            left = (self.count - self.done) / speed / 60
            _LOG.warning(
                f"{self.folder}: sizes of {self.done} of {self.count} images read ({speed:.0f} a second, {left:.0f} "
                "minutes left); they are kept for the next start"
            )
