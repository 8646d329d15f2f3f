"""Batches in the order of a plan, made by worker processes and copied to the device ahead of time."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megdet.data.coco import CocoDataset
from megdet.data.plan import PlannedGroup, TrainingPlan
from megdet.data.transforms import load_batch
from megdet.distributed.layout import Layout
from megdet.errors import InputError
from megdet.structures import Batch

_PREFETCH = 2
"""Batches that each worker keeps ready."""


class _TrainingShares(Dataset[Any]):
    """This rank's micro-batch of (step, group); a pure function, so workers need no state."""

    def __init__(self, dataset: CocoDataset, plan: TrainingPlan, share: slice) -> None:
        self.dataset, self.plan, self.share = dataset, plan, share

    def __getitem__(self, key: tuple[int, int]) -> Batch | InputError:
        step, number = key
        group = self.plan.groups(step)[number]
        return _load_or_error(
            self.dataset, group, group.images[self.share], color_jitter=self.plan.recipe.data.color_jitter
        )


class _Groups(Dataset[Any]):
    def __init__(self, dataset: CocoDataset, groups: Sequence[PlannedGroup]) -> None:
        self.dataset, self.groups = dataset, groups

    def __getitem__(self, number: int) -> Batch | InputError:
        return _load_or_error(self.dataset, self.groups[number], self.groups[number].images)


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


def _load_or_error(
    dataset: CocoDataset, group: PlannedGroup, images: Sequence[Any], color_jitter: float = 0.0
) -> Batch | InputError:
    try:
        return load_batch(dataset, images, group.canvas, color_jitter)
    except InputError as error:  # raised where it is read: a worker would bury it in a traceback
        return error


def _iterate(items: Dataset[Any], order: Any, workers: int, device: torch.device) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        pin_memory=device.type == "cuda",
    )
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    for item in loader:
        if isinstance(item, InputError):
            raise item
        if stream is None:
            yield item
            continue
        with torch.cuda.stream(stream):
            moved = item.to(device)
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
    targets = batch.targets
    for tensor in (batch.pixels, batch.sizes, batch.scales, targets.boxes, targets.labels, targets.image_seeds):
        tensor.record_stream(current)
    return batch
