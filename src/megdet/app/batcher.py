"""Requests that wait for a detector are looked at together.

Images are decoded by a few threads, within a bound of pixels. One thread owns the detectors: it takes what waits for
one of them, up to as many images as fit one of its batches, and calls it once.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO

from megdet.api.images import Pixels
from megdet.app.runs import ServedRun
from megdet.data.image import pixels_fault, read_header, read_image
from megdet.data.room import Room
from megdet.detections import Detections
from megdet.errors import InputError

MOST_WAITING = 64
"""Requests that may wait, sent in part or whole."""
GATHER_SECONDS = 0.005
"""How long the thread of the detectors waits for requests that are on their way, before it looks at those it has."""
_MOST_READERS = 4


class FullError(Exception):
    """As many requests wait as may."""


class TooManyPixelsError(InputError):
    """An image is larger than what is decoded."""


@dataclass(frozen=True)
class Found:
    """What one request gets."""

    detections: Detections
    seconds: float
    """of the call of the detector"""
    together: int
    """images that this call looked at"""


@dataclass(eq=False)
class _Job:
    run: int
    content: bytes
    answer: Future[Found] = field(default_factory=Future)
    pixels: Pixels | None = None
    held: ExitStack = field(default_factory=ExitStack)


class Place:
    """The place of one request among those that may wait. `Batcher.place` makes one."""

    def __init__(self, batcher: "Batcher") -> None:
        self._batcher = batcher
        self.is_used = False

    def submit(self, run: int, content: bytes) -> Future[Found]:
        """Hand in an image file for the run of this index.

        The future gets what is found; InputError for a file that cannot be read, TooManyPixelsError for one that is
        too large; or what the detector raised. Cancelled before the detector is called, the image is left out.
        """
        self.is_used = True
        return self._batcher._submit(_Job(run, content))


class Batcher:
    """The queue, the threads that decode, and the thread that owns the detectors. Close it, or use it in a `with`.

    Args:
        runs: the detectors.
        most_waiting: requests that may wait at a time.
        gather_seconds: how long the detectors wait for requests that are on their way.
    """

    def __init__(
        self, runs: Sequence[ServedRun], most_waiting: int = MOST_WAITING, gather_seconds: float = GATHER_SECONDS
    ) -> None:
        self.runs, self.most_waiting, self.gather_seconds = tuple(runs), most_waiting, gather_seconds
        self.calls = self.answered = 0
        self._jobs: list[_Job] = []
        self._coming = self._waiting = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._room = Room(max(run.max_pixels for run in runs))
        self._readers = ThreadPoolExecutor(min(_MOST_READERS, os.cpu_count() or 1), "read")
        self._worker = threading.Thread(target=self._work, name="detect")
        self._worker.start()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Requests that are being sent, wait, or are looked at."""
        return self._waiting

    @property
    def is_alive(self) -> bool:
        """Whether the thread of the detectors works."""
        return self._worker.is_alive()

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place for a request, taken before its body is read. Raises FullError."""
        with self._changed:
            if self._waiting >= self.most_waiting:
                raise FullError(f"as many requests wait as may ({self.most_waiting})")
            self._waiting += 1
            self._coming += 1
        place = Place(self)
        try:
            yield place
        finally:
            if not place.is_used:
                with self._changed:
                    self._waiting -= 1
                    self._coming -= 1
                    self._changed.notify_all()

    def close(self) -> None:
        """Look at what waits, then end the threads."""
        self._readers.shutdown()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._worker.join()

    def _submit(self, job: _Job) -> Future[Found]:
        self._readers.submit(self._read, job)
        return job.answer

    def _read(self, job: _Job) -> None:
        """Decode an image and put it into the queue; runs in a thread of the readers."""
        try:
            if not job.answer.cancelled():
                self._decode(job)
        except Exception as error:  # it belongs to whoever waits for the answer
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(error)
        with self._changed:
            self._coming -= 1
            if job.pixels is not None:
                self._jobs.append(job)
            self._changed.notify_all()
        if job.pixels is None:
            self._end(job)

    def _decode(self, job: _Job) -> None:
        most = self.runs[job.run].max_pixels
        header = read_header(BytesIO(job.content))
        if fault := pixels_fault(header.height, header.width, most):
            raise TooManyPixelsError(f"the image: {fault}")
        job.held.enter_context(self._room.taken(header.height * header.width))
        job.pixels = Pixels(read_image(BytesIO(job.content), max_pixels=most), "", is_file=False)
        job.content = b""

    def _work(self) -> None:
        while (jobs := self._taken()) is not None:
            asked = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            if asked:
                self._look(asked)
            for job in jobs:
                self._end(job)

    def _taken(self) -> list[_Job] | None:
        """The images that are looked at next, all of the run that has waited longest; None when all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            if not self._jobs:
                return None
            run = self._jobs[0].run
            most = self.runs[run].most_together
            self._changed.wait_for(
                lambda: not self._coming or sum(job.run == run for job in self._jobs) >= most, self.gather_seconds
            )
            taken = [job for job in self._jobs if job.run == run][:most]
            self._jobs = [job for job in self._jobs if job not in taken]
            return taken

    def _look(self, jobs: list[_Job]) -> None:
        """Call the detector once; where it fails, once an image, so that one image does not spoil the others."""
        started = time.perf_counter()
        try:
            found = self.runs[jobs[0].run].detect([job.pixels for job in jobs if job.pixels is not None])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
            else:
                for job in jobs:
                    self._look([job])
            return
        seconds = time.perf_counter() - started
        self.calls += 1
        self.answered += len(jobs)
        for job, own in zip(jobs, found, strict=True):
            job.answer.set_result(Found(own, seconds, len(jobs)))

    def _end(self, job: _Job) -> None:
        job.pixels = None
        job.held.close()
        with self._changed:
            self._waiting -= 1
