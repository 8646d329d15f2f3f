"""Batches in the order of a plan, made by worker processes and copied to the device ahead of time."""

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megdet.data.batches import LOOK_SECONDS, Loaded, Pickled, handed_over, prepare_process, received
from megdet.data.cache import ImageCache, image_cache
from megdet.data.coco import CocoDataset
from megdet.data.plan import PlannedGroup, PlannedImage, TrainingPlan
from megdet.data.transforms import load_batch
from megdet.distributed.layout import Layout
from megdet.errors import InputError
from megdet.structures import Batch

_LOG = logging.getLogger(__name__)
_PREFETCH = 2
"""Batches that each worker keeps ready."""


class _TrainingShares(Dataset[Loaded | Pickled]):
    """This rank's micro-batch of (step, group); a pure function, so workers need no state."""

    def __init__(self, dataset: CocoDataset, plan: TrainingPlan, share: slice) -> None:
        self.dataset, self.plan, self.share = dataset, plan, share
        self.cache = image_cache(plan.recipe.data, dataset)

    def __getitem__(self, key: tuple[int, int]) -> Loaded | Pickled:
        step, number = key
        group = self.plan.groups(step)[number]
        return _load(self.dataset, group, group.images[self.share], self.plan.recipe.data.color_jitter, self.cache)


class _Groups(Dataset[Loaded | Pickled]):
    def __init__(self, dataset: CocoDataset, groups: Sequence[PlannedGroup]) -> None:
        self.dataset, self.groups = dataset, groups

    def __getitem__(self, number: int) -> Loaded | Pickled:
        return _load(self.dataset, self.groups[number], self.groups[number].images)


class _StepOrder:
    """(step, group) of a rank from one step to another."""

    def __init__(self, first: int, last: int, groups: range) -> None:
        self.first, self.last, self.groups = first, last, groups

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, group) for step in range(self.first, self.last) for group in self.groups)

    def __len__(self) -> int:
        return (self.last - self.first) * len(self.groups)


def training_batches(
    dataset: CocoDataset,
    plan: TrainingPlan,
    layout: Layout,
    rank: int,
    steps: tuple[int, int],
    *,
    workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """A rank's micro-batches from the first step to before the last: len(layout.groups_of(rank)) a step, in order.

    A share may be empty. Raises InputError for an image that cannot be read.
    """
    shares = _TrainingShares(dataset, plan, layout.share_of(rank))
    return _iterate(shares, _StepOrder(*steps, layout.groups_of(rank)), workers, device)


def group_batches(
    dataset: CocoDataset, groups: Sequence[PlannedGroup], *, workers: int, device: torch.device
) -> Iterator[Batch]:
    """One batch a group, in order, without colour jitter."""
    return _iterate(_Groups(dataset, groups), range(len(groups)), min(workers, len(groups)), device)


def _load(
    dataset: CocoDataset,
    group: PlannedGroup,
    images: Sequence[PlannedImage],
    color_jitter: float = 0.0,
    cache: ImageCache | None = None,
) -> Loaded | Pickled:
    try:
        batch = load_batch(dataset, images, group.canvas, color_jitter, cache)
    except InputError as error:  # raised where it is read: a worker would bury it in a traceback
        return Loaded(error, cache.take_notices() if cache else [])
    return handed_over(batch, cache.take_notices() if cache else [])


def _start_method(device: torch.device) -> str | None:
    """How loading processes start: None is the platform's own way.

    A process that uses CUDA must not be forked. A server that never used it can be, which is quicker than a fresh
    interpreter for each process and evaluation.
    """
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    return "forkserver" if device.type == "cuda" and has_server else None


def _iterate(items: Dataset[Loaded | Pickled], order: Any, workers: int, device: torch.device) -> Iterator[Batch]:
    method = _start_method(device) if workers else None
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(["__main__", __name__])  # imported once, not by every loading process
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        pin_memory=device.type == "cuda",
        multiprocessing_context=method,
        timeout=LOOK_SECONDS if workers else 0,
        worker_init_fn=prepare_process,
    )
    said: set[str] = set()
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    for batch, notices in received(loader):
        for notice in notices:
            if notice not in said:  # the processes meet the same full disk
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
