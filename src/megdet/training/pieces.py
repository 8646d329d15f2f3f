"""The forwards and backwards of a rank's micro-batches; if memory runs out they are made again in smaller pieces.

A smaller piece recomputes the inside of each block in the backward (`recompute: block`) and, without batch statistics,
is a single image. Neither changes the result, so the other ranks need not know: this rank begins its part of the step
again, with the statistics that its lane has already computed, and the others wait in their collectives. Gradients, sums
of statistics and losses are first reset to their values before the failed try; nothing else changes before the update.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megdet.distributed.gradients import GradientBuckets
from megdet.layers.batch_norm import has_statistics, step_sums
from megdet.layers.exchanges import Exchanges, remembered
from megdet.memory import give_memory_back, is_out_of_memory
from megdet.model.detector import Detector
from megdet.precision import arithmetic, backward, dtype_of
from megdet.recipe import Recipe, RecomputePlan
from megdet.structures import Batch
from megdet.training.images_apart import ImagesApart

_LOG = logging.getLogger(__name__)
Again = Callable[[], Iterable[Batch]]
"""Loads the micro-batches of a step again."""


@dataclass
class Pieces:
    """The pieces in which micro-batches are computed: more pixels, smaller pieces."""

    limits: list[int] = field(default_factory=list)
    """pixels of a micro-batch from which recompute begins, and from which images are taken one by one"""
    repeated: int = 0
    """parts of steps that were made again since the last `take_repeated`"""

    def size_of(self, batch: Batch) -> int:
        """0 = as in the recipe, 1 = with recompute, 2 = images one by one."""
        return sum(_pixels(batch) >= limit for limit in self.limits)

    def shrink(self, batch: Batch, smallest: int) -> bool:
        """Use smaller pieces for this micro-batch and larger ones from now on; False if there are no smaller pieces."""
        size = self.size_of(batch) + 1
        if size > smallest:
            return False
        kept = [limit for limit in self.limits if limit < _pixels(batch)]
        self.limits = [*kept, *[_pixels(batch)] * (size - len(kept)), *self.limits[size:]]
        return True

    def take_repeated(self) -> int:
        """How many parts of steps were made again since the last call."""
        repeated, self.repeated = self.repeated, 0
        return repeated


def accumulate(
    model: Detector,
    recipe: Recipe,
    buckets: GradientBuckets,
    pieces: Pieces,
    micro_batches: Iterable[Batch],
    count: int,
    device: torch.device,
    again: Again | None = None,
    apart: ImagesApart | None = None,
) -> Tensor:
    """Backward through `count` micro-batches, sending gradients while the last one runs.

    Args:
        model: its gradients and sums of statistics are added to.
        recipe: the recipe of the run.
        buckets: the gradients of the model.
        pieces: how micro-batches are cut; changed if one does not fit.
        micro_batches: the micro-batches in order.
        count: number of micro-batches.
        device: the device of the model.
        again: loads the micro-batches again; without it a step is not made again.
        apart: computes each image apart (`exact`).

    Returns the model's losses and counts, summed over the images, in fixed point if images are computed apart. Raises
    torch's error if memory runs out and there are no smaller pieces.
    """
    batches = iter(micro_batches)
    if again is None:
        return _sums(_Work(model, recipe, buckets, pieces, batches, count, device, apart))
    sums = step_sums(model.modules())
    before = list(torch._foreach_add(sums, 0.0)) if sums else []  # copies, in one launch on a GPU
    groups_before = 0 if apart is None else len(apart.rows)
    with remembered(Exchanges()) as exchanges:
        work = _Work(model, recipe, buckets, pieces, batches, count, device, apart)
        while True:
            try:
                return _sums(work)
            except (RuntimeError, MemoryError) as error:
                reason = " ".join(str(error).split())[:80]
                if not is_out_of_memory(error) or work.now is None:
                    raise
                if not pieces.shrink(work.now, smallest_pieces(model, recipe)):
                    raise
            # here, after the frames of the failed try have freed their tensors
            _LOG.warning(f"memory ran out ({reason}): this part of the step is made again in smaller pieces")
            pieces.repeated += 1
            for _ in batches:  # skip micro-batches of the failed try that were not yet used
                pass
            work = _Work(model, recipe, buckets, pieces, iter(again()), count, device, apart)
            buckets.begin_again()
            if apart is not None:
                del apart.rows[groups_before:]
            if sums:
                torch._foreach_copy_(sums, before)
            exchanges.rewind()
            give_memory_back(device)


def smallest_pieces(model: Detector, recipe: Recipe) -> int:
    """The smallest size, as in `Pieces.size_of`, into which micro-batches can be cut with the same result."""
    if not has_statistics(model) and not recipe.exact:
        return 2
    return 1 if recipe.recompute == "none" and model.backbone.has_blocks else 0


@dataclass
class _Work:
    model: Detector
    recipe: Recipe
    buckets: GradientBuckets
    pieces: Pieces
    batches: Iterator[Batch]
    count: int
    device: torch.device
    apart: ImagesApart | None = None
    now: Batch | None = None
    """the current micro-batch"""


def _sums_of_images_apart(work: _Work, apart: ImagesApart) -> Tensor:
    totals = torch.zeros(2, len(work.model.reported()), device=work.device, dtype=torch.int64)
    with arithmetic(work.recipe.precision, work.device):
        for batch in work.batches:
            work.now = batch
            totals += apart.losses(batch, _recompute_plan(work, batch), work.device)
    return totals


def _recompute_plan(work: _Work, batch: Batch) -> RecomputePlan:
    is_plain = work.recipe.recompute == "none" and work.model.backbone.has_blocks
    return "block" if is_plain and work.pieces.size_of(batch) else work.recipe.recompute


def _sums(work: _Work) -> Tensor:
    if work.apart is not None:
        return _sums_of_images_apart(work, work.apart)
    model, recipe = work.model, work.recipe
    totals = torch.zeros(len(model.reported()), device=work.device, dtype=dtype_of(recipe.precision))
    for number, batch in enumerate(work.batches):
        work.now, size = batch, work.pieces.size_of(batch)
        model.set_recompute(_recompute_plan(work, batch))
        cut = list(_one_by_one(batch)) if size > 1 else [batch]
        for place, piece in enumerate(cut):
            with arithmetic(recipe.precision, work.device):
                losses = model(piece)
            loss = torch.stack([losses[name].sum() for name in model.loss_names]).sum() / recipe.batch_size
            if number == work.count - 1 and place == len(cut) - 1:
                work.buckets.overlap()
            backward(loss, recipe.precision)
            totals += torch.stack([losses[name].detach().sum() for name in model.reported()]).to(totals.dtype)
    return totals


def _one_by_one(batch: Batch) -> Iterator[Batch]:
    for image in range(max(1, len(batch.image_index))):
        yield batch[image : image + 1]


def _pixels(batch: Batch) -> int:
    return batch.pixels.numel() // 3
