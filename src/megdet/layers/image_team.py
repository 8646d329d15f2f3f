"""Images that are computed apart, each as a batch of one, and meet only where they share batch statistics.

What an image computes then depends on that image and its canvas alone, whatever layers a network has: no operation
sees another image. Each image has a thread, and every operation runs on one thread, so that several images run at once
on several cores and no sum is split among threads. A norm layer asks the images of its group for their numbers; a
thread waits there until all images of the micro-batch have come and the ranks of the lane have told each other theirs.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from megdet.distributed.lane import Lane
from megdet.layers.exchanges import exchanged

T = TypeVar("T")
_ACTIVE = threading.local()


class _AbandonedError(Exception):
    """Another image of the micro-batch has failed."""


def current_image() -> "ImageOfTeam | None":
    """The image that is computed in this thread, if images are computed apart."""
    return getattr(_ACTIVE, "image", None)


class ImageTeam:
    """The images of one micro-batch, which is this rank's share of a group.

    Args:
        num_images: of the share; 0 where the rank has none of this group.
        group_size: images of the whole group.
        at_once: how many are computed at the same time.
    """

    def __init__(self, num_images: int, group_size: int, at_once: int) -> None:
        self.num_images, self.group_size, self.at_once = num_images, group_size, at_once
        self.size = max(1, num_images)
        self._changed = threading.Condition()
        self._rows: dict[int, Tensor] = {}
        self._result: Tensor | None = None
        self._round, self._running, self._ended = 0, 0, 0
        self._has_failed = False

    def run(self, pool: ThreadPoolExecutor, works: Sequence[Callable[[], T]]) -> list[T]:
        """The results of the images' work, one call an image, in their order; the pool has a thread for each.

        Raises what an image raises; the others are then given up.
        """
        futures: list[Future[T]] = [pool.submit(self._run_one, place, work) for place, work in enumerate(works)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, _AbandonedError):
                raise error
        return [future.result() for future in futures]

    def _run_one(self, place: int, work: Callable[[], T]) -> T:
        _ACTIVE.image = ImageOfTeam(self, place)
        try:
            with self._changed:
                self._wait(lambda: True)
            result = work()
            with self._changed:
                self._ended += 1
                if self._rows:
                    raise RuntimeError("an image has ended while others wait for its statistics")
        except BaseException:
            with self._changed:
                self._has_failed = True
            raise
        finally:
            _ACTIVE.image = None
            with self._changed:
                self._running -= 1
                self._changed.notify_all()
        return result

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        """Wait for a place among those that run; `_changed` is held."""
        self._changed.wait_for(lambda: self._has_failed or (is_ready() and self._running < self.at_once))
        self._running += 1
        if self._has_failed:
            raise _AbandonedError

    def gathered(self, place: int, own: Tensor, lane: Lane) -> Tensor:
        """The rows of all images of the group in the order of the plan; `own` is that of the image at a place."""
        with self._changed:
            if self._ended:
                self._has_failed = True
                raise RuntimeError("images of one micro-batch share another number of statistics")
            self._rows[place] = own
            if len(self._rows) < self.size:
                this_round = self._round
                self._running -= 1
                self._changed.notify_all()
                self._wait(lambda: self._round > this_round)
            else:
                rows = torch.stack([self._rows[number] for number in range(self.size)])
                self._result = self._of_lane(rows, lane)
                self._rows = {}
                self._round += 1
                self._changed.notify_all()
            assert self._result is not None
            return self._result

    def _of_lane(self, rows: Tensor, lane: Lane) -> Tensor:
        """The rows of all ranks of the lane, in their order, without those that stand for no image."""
        if lane.width == 1:
            return rows
        most = -(-self.group_size // lane.width)
        sent = rows.new_zeros(most, rows.shape[1] + 1)
        sent[: self.num_images, :-1] = rows[: self.num_images]
        sent[: self.num_images, -1] = 1

        def exchange() -> Tensor:
            found = sent.new_empty(lane.width * most, sent.shape[1])
            distributed.all_gather_into_tensor(found, sent, group=lane.process_group)
            return found

        found = exchanged(exchange)
        return found[found[:, -1] > 0, :-1].contiguous()


class ImageOfTeam:
    """One image of a team, as norm layers see it in its thread."""

    def __init__(self, team: ImageTeam, place: int) -> None:
        self.team, self.place = team, place

    @property
    def is_first(self) -> bool:
        """Whether it is the one that notes what all images of the micro-batch have found together."""
        return self.place == 0

    def gathered(self, own: Tensor, lane: Lane) -> Tensor:
        """The rows of numbers of all images of the group, one an image; each image of it gives its own."""
        return self.team.gathered(self.place, own, lane)


def thread_pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads whose operations run on one thread each."""
    return ThreadPoolExecutor(num_threads, "megdet image", _on_one_thread)


def _on_one_thread(*_: Any) -> None:
    torch.set_num_threads(1)
