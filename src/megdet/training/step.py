"""One optimizer update (Eq. 1): the mean of the losses of the mini-batch's images, wherever the images are.

    for each micro-batch of this rank:  loss = sum of its images' losses / batch_size;  backward
    sum the gradients over all ranks;   judge;   fold the groups' statistics;   clip;   update

An update that the watch refuses changes nothing but the watch's own count (`watch.py`).

If AGVM or the gradient noise scale is due, the gradients of the first and of the second half of the plan's groups are
summed over all ranks one after the other, and their sum is the gradient of the step.

Only NMS waits for numbers from the device, the lengths of its segments; the caller decides when to read the results.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megdet.distributed.fixed_point import LOSS_BITS, summed_numbers
from megdet.distributed.termination import STOP_SIGNALS
from megdet.distributed.world import World
from megdet.layers.batch_norm import finish_step
from megdet.precision import dtype_of
from megdet.structures import Batch
from megdet.training.optimizers.optimizer import step_unless
from megdet.training.optimizers.parts import num_in_first_half
from megdet.training.pieces import accumulate
from megdet.training.trainer import Trainer
from megdet.training.watch import Verdict

NUM_NOTES = len(STOP_SIGNALS) + 3
"""Flags of a rank that a step counts: a run's signals, clock, divergence and faults (`agreement.py`)"""


@dataclass(frozen=True)
class StepResult:
    """The results of a step. Its tensors are on the device and may not be computed yet."""

    step: int
    """the number of the step: 0, 1, ..."""
    rate: float
    """the scheduled learning rate"""
    means: Mapping[str, Tensor]
    """every loss and count, each a mean over the images of the mini-batch"""
    gradient_norm: Tensor
    """before clipping"""
    verdict: Verdict
    """whether the update was applied"""
    notes: Tensor
    """on how many ranks each of the caller's notes was true; zeros without notes"""
    agvm: Tensor | None = None
    """the measurement of AGVM, if it was due"""
    noise: Tensor | None = None
    """the measurement of the noise scale, if it was due"""
    seconds: float = 0.0
    """seconds from the end of the step before to the end of this one"""
    data_seconds: float = 0.0
    """the part of `seconds` spent waiting for images"""


def train_step(
    trainer: Trainer,
    micro_batches: Iterable[Batch],
    groups: Sequence[int],
    rate: float,
    step: int,
    world: World,
    notes: Callable[[], Sequence[bool]] | None = None,
    again: Callable[[], Iterable[Batch]] | None = None,
) -> StepResult:
    """Make one update from this rank's micro-batches.

    Every rank calls it for every step, also without a micro-batch or with empty ones.

    Args:
        trainer: changed in place.
        micro_batches: this rank's share of each of its groups.
        groups: the numbers of these groups in the plan's step, rising (`Layout.groups_of`).
        rate: the scheduled learning rate.
        step: 0, 1, ...
        world: all ranks.
        notes: called after the last backward; gives NUM_NOTES flags. The ranks with each flag set are counted in the
            reduction that the step makes anyway.
        again: loads the micro-batches again if memory runs out; without it the error is raised.
    """
    recipe, buckets, reported = trainer.recipe, trainer.buckets, trainer.model.reported()
    buckets.zero()
    apart, all_groups = trainer.apart, list(groups)
    totals = torch.zeros(len(reported), device=world.device, dtype=dtype_of(recipe.precision))
    if apart is not None:
        totals = torch.zeros(2, len(reported), device=world.device, dtype=torch.int64)
    several = trainer.model, recipe, buckets, trainer.pieces
    batches, first_half, done = iter(micro_batches), None, 0
    if _needs_halves(trainer, step):
        number = num_in_first_half(groups, recipe.groups_per_step)
        first_again = None if again is None else lambda: islice(again(), number)
        totals += accumulate(*several, islice(batches, number), number, world.device, first_again, apart)
        first_half, done = buckets.set_aside(), number
        groups = groups[number:]
    rest_again = None if again is None else lambda: islice(again(), done, None)
    totals += accumulate(*several, batches, len(groups), world.device, rest_again, apart)
    buckets.finish()
    agvm, noise = _measure(trainer, first_half, step)
    if first_half is not None:
        torch._foreach_add_(buckets.gradients, first_half)
    # room for the notes in any case: in which order a collective adds numbers depends on how many there are
    summed = torch.cat([totals.flatten(), totals.new_zeros(NUM_NOTES)])
    flat, counted = torch.split(summed, [totals.numel(), NUM_NOTES])
    totals = flat.view_as(totals)
    for place, is_true in enumerate(notes() if notes is not None else ()):
        if is_true:
            counted[place] += 1  # copying a tensor of these numbers to the device would wait
    world.all_reduce(summed)
    rows = None
    if apart is not None:
        totals = summed_numbers(totals, LOSS_BITS).to(dtype_of(recipe.precision))
        rows = apart.take_rows(all_groups, world)
    norm = buckets.norm()
    verdict = trainer.watch.judge(totals[: len(trainer.model.loss_names)], norm)
    finish_step(trainer.model.modules(), recipe.groups_per_step, world, verdict.is_left_out, rows)
    for measured in (trainer.agvm, trainer.noise):
        if measured is not None:
            measured.settle(verdict.is_left_out)
    if recipe.optimizer.clip_norm:
        factor = (recipe.optimizer.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        buckets.scale(factor.masked_fill(verdict.is_left_out, 1.0))  # a gradient that is not applied is not clipped
    if trainer.agvm is not None:
        trainer.agvm.set_rates(rate)
    else:
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
    step_unless(trainer.optimizer, verdict.is_left_out)
    if trainer.averages is not None:
        trainer.averages.update(trainer.model, step, unless=verdict.is_left_out)
    means = dict(zip(reported, (totals / recipe.batch_size).unbind(), strict=True))
    return StepResult(step, rate, means, norm.to(totals.dtype), verdict, counted, agvm, noise)


def read_results(results: Sequence[StepResult], trainer: Trainer) -> list[dict[str, Any]]:
    """The numbers of some steps for their lines of metrics; waits for the device."""
    values = torch.stack([torch.stack([*own.means.values(), own.gradient_norm]) for own in results]).tolist()
    verdicts = torch.stack([torch.stack([own.verdict.is_left_out, own.verdict.limit]) for own in results]).tolist()
    lines: list[dict[str, Any]] = []
    for result, row, (is_left_out, limit) in zip(results, values, verdicts, strict=True):
        line: dict[str, Any] = dict(zip((*result.means, "gradient_norm"), row, strict=True))
        if is_left_out:
            line["left_out"] = _why_left_out(line, limit, trainer)
        if trainer.agvm is not None and result.agvm is not None:
            line["agvm"] = trainer.agvm.named(result.agvm.tolist())
        if trainer.noise is not None and result.noise is not None:
            line["noise"] = trainer.noise.named(result.noise.tolist())
        lines.append({"loss": sum(line[name] for name in trainer.model.loss_names), **line})
    return lines


def _why_left_out(numbers: Mapping[str, float], limit: float, trainer: Trainer) -> str:
    """The first number of a step that is not finite, or how far its gradient is beyond the limit."""
    for name in (*trainer.model.loss_names, "gradient_norm"):
        if not math.isfinite(numbers[name]):
            return f"{name} is not finite"
    norm, watch = numbers["gradient_norm"], trainer.recipe.watch
    return (
        f"gradient_norm {norm:.4g} is above {limit:.4g}, {watch.explodes_at:g} times the median of the last "
        f"{watch.window}"
    )


def _needs_halves(trainer: Trainer, step: int) -> bool:
    agvm, noise = trainer.agvm, trainer.noise
    is_noise_due = noise is not None and noise.compares_halves and noise.is_due(step)
    return is_noise_due or (agvm is not None and agvm.is_due(step))


def _measure(trainer: Trainer, first_half: list[Tensor] | None, step: int) -> tuple[Tensor | None, Tensor | None]:
    """The measurements of AGVM and of the noise scale, from the gradients before clipping."""
    agvm, noise, gradients = trainer.agvm, trainer.noise, trainer.buckets.gradients
    of_agvm, of_noise = None, None
    if noise is not None and not noise.compares_halves:
        of_noise = noise.of_steps(gradients, step)
    elif noise is not None and first_half is not None and noise.is_due(step):
        of_noise = noise.of_halves(first_half, gradients, step)
    if agvm is not None and first_half is not None and agvm.is_due(step):
        of_agvm = agvm.update(first_half, gradients)
    return of_agvm, of_noise
