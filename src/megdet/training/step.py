"""One optimizer update (Eq. 1): the mean of the losses of the mini-batch's images, wherever the images are.

    for each micro-batch of this rank:  loss = sum of its images' losses / batch_size;  backward
    sum the gradients over all ranks;   fold the groups' statistics;   clip;   update

Nothing here reads a number from the device but NMS, which needs the lengths of its segments; the caller decides when to
look at the results.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megdet.distributed.gradients import GradientBuckets
from megdet.distributed.world import World
from megdet.layers.batch_norm import finish_step
from megdet.model.detector import LOSSES, Detector
from megdet.recipe import Recipe
from megdet.structures import Batch
from megdet.training.optimizer import MovingAverage

REPORTED = (*LOSSES, "rpn_positive", "box_head_positive")
"""What a step reports, each as a mean over the images of the mini-batch, followed by the norm of the gradient."""


@dataclass
class Trainer:
    """Everything that a step changes."""

    model: Detector
    optimizer: torch.optim.SGD
    buckets: GradientBuckets
    averages: MovingAverage | None


def train_step(
    trainer: Trainer, micro_batches: Iterable[Batch], num_micro_batches: int, rate: float, step: int, world: World
) -> Tensor:
    """Make one update from this rank's micro-batches; returns the REPORTED means and the gradient norm, on the device.

    Every rank of the world calls it for every step, also with no micro-batch or with empty ones.
    """
    recipe, buckets = trainer.model.recipe, trainer.buckets
    buckets.zero()
    totals = torch.zeros(len(REPORTED), device=world.device, dtype=_result_dtype(recipe))
    for number, batch in enumerate(micro_batches):
        with autocast(recipe, world.device):
            losses = trainer.model(batch)
        loss = torch.stack([losses[name].sum() for name in LOSSES]).sum() / recipe.batch_size
        if number == num_micro_batches - 1:
            buckets.overlap()
        loss.backward()  # type: ignore[no-untyped-call]
        totals += torch.stack([losses[name].detach().sum() for name in REPORTED]).to(totals.dtype)
    buckets.finish()
    world.all_reduce(totals)
    finish_step(trainer.model.modules(), recipe.groups_per_step, world)
    norm = buckets.norm()
    if recipe.optimizer.clip_norm:
        buckets.scale((recipe.optimizer.clip_norm / (norm + 1e-6)).clamp(max=1.0))
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate
    trainer.optimizer.step()
    if trainer.averages is not None:
        trainer.averages.update(trainer.model, step)
    return torch.cat([totals / recipe.batch_size, norm.to(totals.dtype).reshape(1)])


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """Convolutions and matrix products in bfloat16 where the recipe asks for it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16")


def _result_dtype(recipe: Recipe) -> torch.dtype:
    return torch.float64 if recipe.precision == "float64" else torch.float32
