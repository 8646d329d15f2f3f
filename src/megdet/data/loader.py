"""Batches in the order of a plan, made by worker processes and copied to the device ahead of time."""

import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megdet.data.batches import LOOK_SECONDS, Loaded, Pickled, handed_over, prepare_process, received
from megdet.data.cache import ImageCache, image_cache
from megdet.data.coco import CocoDataset
from megdet.data.far.opening import notices_of
from megdet.data.plan import TrainingPlan
from megdet.data.planned import PlannedGroup, PlannedImage
from megdet.data.transforms import load_batch
from megdet.data.unreadable import MOST_IN_A_ROW, Replaced, UnreadableImageError, stand_in, without
from megdet.distributed.layout import Layout
from megdet.errors import InputError
from megdet.structures import Batch

_LOG = logging.getLogger(__name__)
_PREFETCH = 2
"""Batches that each worker keeps ready."""
_REPLACE = "with --data.unreadable replace the run goes on without it"
_NO_SCORE = "it is not replaced, since the score would be that of other data"
_StandIn = Callable[..., PlannedImage]
"""Takes an image and the `canvas` of its group."""


@dataclass
class LoadingFaults:
    """Faults in loading the images of this rank that were mended; collected until `take` is called."""

    replaced: list[Replaced] = field(default_factory=list)
    """images that could not be read"""
    restarts: int = 0
    """how often loading processes were restarted because one had been killed"""

    def __bool__(self) -> bool:
        return bool(self.replaced or self.restarts)

    def take(self) -> "LoadingFaults":
        """The faults since the last call."""
        taken = LoadingFaults(self.replaced, self.restarts)
        self.replaced, self.restarts = [], 0
        return taken


class _TrainingShares(Dataset[Loaded | Pickled]):
    """Gives this rank's micro-batch for (step, group); a pure function, so workers need no state."""

    def __init__(self, dataset: CocoDataset, plan: TrainingPlan, share: slice) -> None:
        self.dataset, self.plan, self.share = dataset, plan, share
        self.cache = image_cache(plan.recipe.data, dataset)

    def __getitem__(self, key: tuple[int, int]) -> Loaded | Pickled:
        step, number = key
        group, data = self.plan.groups(step)[number], self.plan.recipe.data
        own = group.images[self.share]
        found = partial(stand_in, self.plan) if data.unreadable == "replace" else None
        return _load(self.dataset, group, own, data.color_jitter, self.cache, found, step, _REPLACE)


class _Groups(Dataset[Loaded | Pickled]):
    def __init__(self, dataset: CocoDataset, groups: Sequence[PlannedGroup]) -> None:
        self.dataset, self.groups = dataset, groups

    def __getitem__(self, number: int) -> Loaded | Pickled:
        return _load(self.dataset, self.groups[number], self.groups[number].images, mend=_NO_SCORE)


class _StepOrder:
    """The (step, group) pairs of a rank from step `first` to before `last`."""

    def __init__(self, first: int, last: int, groups: range) -> None:
        self.first, self.last, self.groups = first, last, groups

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, group) for step in range(self.first, self.last) for group in self.groups)

    def __len__(self) -> int:
        return (self.last - self.first) * len(self.groups)


class _Rest:
    """An order without its first `done` items."""

    def __init__(self, order: Any, done: int) -> None:
        self.order, self.done = order, done

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.order), self.done, None)

    def __len__(self) -> int:
        return len(self.order) - self.done


def training_batches(
    dataset: CocoDataset,
    plan: TrainingPlan,
    layout: Layout,
    rank: int,
    steps: tuple[int, int],
    *,
    workers: int,
    device: torch.device,
    faults: LoadingFaults | None = None,
) -> Iterator[Batch]:
    """A rank's micro-batches from step `first` to before `last`: len(layout.groups_of(rank)) a step, in order.

    A micro-batch may be empty. Faults that were mended are added to `faults`.

    Raises InputError for an unreadable image that `data.unreadable` does not replace, or if loading processes die too
    often.
    """
    shares = _TrainingShares(dataset, plan, layout.share_of(rank))
    return _iterate(shares, _StepOrder(*steps, layout.groups_of(rank)), workers, device, faults)


def group_batches(
    dataset: CocoDataset, groups: Sequence[PlannedGroup], *, workers: int, device: torch.device
) -> Iterator[Batch]:
    """One batch a group, in order, without colour jitter.

    Raises InputError for an unreadable image, whatever `data.unreadable` says: without it the score would be that of
    another data set.
    """
    return _iterate(_Groups(dataset, groups), range(len(groups)), min(workers, len(groups)), device)


def _load(
    dataset: CocoDataset,
    group: PlannedGroup,
    images: Sequence[PlannedImage],
    color_jitter: float = 0.0,
    cache: ImageCache | None = None,
    found: _StandIn | None = None,
    step: int = 0,
    mend: str = "",
) -> Loaded | Pickled:
    """A batch. `found` names the image to take in place of an unreadable one; without it `mend` ends the refusal."""
    own, replaced, tries = list(images), list[Replaced](), Counter[int]()
    while True:
        try:
            batch = load_batch(dataset, own, group.canvas, color_jitter, cache)
            break
        except UnreadableImageError as error:  # raised by the receiver: a worker would wrap it in a traceback
            row = next(row for row, image in enumerate(own) if error.index in image.indices)
            tries[row] += 1
            if found is None or tries[row] > MOST_IN_A_ROW:
                return Loaded(InputError(f"{error}; {mend}"), _notices(dataset, cache), replaced)
            own[row], other = without(own[row], error.index, partial(found, canvas=group.canvas))
            replaced.append(Replaced(step, error.index, other.index, error.reason))
        except MemoryError:
            return Loaded(InputError("the memory has no room for the next images: give fewer --workers"), [], replaced)
    return handed_over(batch, _notices(dataset, cache), replaced)


def _notices(dataset: CocoDataset, cache: ImageCache | None) -> list[str]:
    """What the user should know of the images that this process has read since the last call."""
    return [*(cache.take_notices() if cache else []), *notices_of(dataset.image_folder)]


def _start_method(device: torch.device) -> str | None:
    """How loading processes start; None is the platform's default.

    A process that uses CUDA must not be forked. A fork server that never used CUDA can be, which is faster than a new
    interpreter for each process and evaluation.
    """
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    return "forkserver" if device.type == "cuda" and has_server else None


def _iterate(
    items: Dataset[Loaded | Pickled],
    order: Any,
    workers: int,
    device: torch.device,
    faults: LoadingFaults | None = None,
) -> Iterator[Batch]:
    method = _start_method(device) if workers else None
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(["__main__", __name__])  # imported once, not by every loading process

    def loader_from(done: int) -> DataLoader[Any]:
        return DataLoader(
            items,
            batch_size=None,
            sampler=_Rest(order, done),
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            pin_memory=device.type == "cuda",
            multiprocessing_context=method,
            timeout=LOOK_SECONDS if workers else 0,
            worker_init_fn=prepare_process,
        )

    def restarted(sentence: str) -> None:
        if faults is not None:
            faults.restarts += 1
        _LOG.warning(sentence)

    said: set[str] = set()
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    for batch, notices, replaced in received(loader_from, restarted):
        if faults is not None:
            faults.replaced += replaced
        elif replaced:
            notices = [*notices, *(f"{own.reason}: another image takes its place" for own in replaced)]
        for notice in notices:
            if notice not in said:  # each process meets the same full disk
                _LOG.warning(notice)
            said.add(notice)
        if isinstance(batch, InputError):
            raise batch
        if stream is None:
            yield batch
            continue
        with torch.cuda.stream(stream):
            moved = batch.to(device)
            copied = stream.record_event()
        if ahead is not None:
            yield _ready(*ahead)
        ahead = moved, copied
    if ahead is not None:
        yield _ready(*ahead)


def _ready(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Make the current stream wait for the copy of this batch, not of the next, and keep its memory for that stream."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in batch.tensors():
        tensor.record_stream(current)
    return batch
