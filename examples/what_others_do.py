"""Five habits of other trainers, each put into ours, and by how much each makes two devices differ from one.

    python examples/what_others_do.py

Every habit is a function of (trainer, world), applied inside each rank before its first step. It runs on one
device and on two, from the same weights, on the same images, in float64: the number of devices alone differs.
"""

import importlib
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from megdet.contract.verify import verify
from megdet.data.plan import canvas_of
from megdet.distributed.lane import Lane
from megdet.distributed.world import World
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.recipe_file import load_recipe
from megdet.structures import Batch
from megdet.training.trainer import Trainer

STEPS = 5


def rank_local_normalizers(trainer: Trainer, world: World) -> None:
    """Divide a loss by the samples on this rank, and average over ranks: torchvision or mmdetection under DDP.

    Ours divides each image's loss by the image's own samples (Eq. 1). For layouts of one forward a rank and step.
    """
    images_a_rank = trainer.recipe.batch_size / world.size

    def mean_of_rank(values: Tensor, is_valid: Tensor) -> Tensor:
        return values.sum(1) / is_valid.sum().clamp(min=1) * images_a_rank

    for name in ("megdet.model.rpn", "megdet.model.roi_head"):
        module: Any = importlib.import_module(name)
        module.mean_per_image = mean_of_rank


def broadcast_buffers(trainer: Trainer, world: World) -> None:
    """Keep the running statistics of rank 0's images, and forget the others': DDP with broadcast_buffers=True."""
    groups_a_step, forwards = trainer.recipe.groups_per_step, [0]
    sum_gradients = trainer.buckets.finish

    def count(*_: Any) -> None:
        forwards[0] += 1

    def keep_the_first_ranks() -> None:
        sum_gradients()
        factor = groups_a_step / forwards[0] if world.is_first else 0.0
        forwards[0] = 0
        for norm in _norms(trainer):
            norm.step_mean *= factor
            norm.step_var *= factor

    trainer.model.register_forward_pre_hook(count)
    trainer.buckets.finish = keep_the_first_ranks  # type: ignore[method-assign]


def seeds_of_ranks(trainer: Trainer, world: World) -> None:
    """Sample anchors and RoIs by a generator of each rank: the seed + rank of most training scripts."""

    def reseed(_: nn.Module, arguments: tuple[Batch]) -> None:
        arguments[0].targets.image_seeds.add_(world.rank)

    trainer.model.register_forward_pre_hook(reseed)


class FirstLane(Lane):
    """A lane of one, whose statistics are those of the group."""

    is_first = True


class OtherLane(Lane):
    """A lane of one, whose statistics nobody asks for."""

    is_first = False


def local_batch_norm(trainer: Trainer, world: World) -> None:
    """Normalise a rank's share of the images alone: plain BatchNorm2d under DDP."""
    for norm in _norms(trainer):
        norm.lane = FirstLane(1) if world.is_first else OtherLane(1)


def own_canvas(trainer: Trainer, world: World) -> None:  # noqa: ARG001  # called like the other habits
    """Pad a rank's share of the images to the largest of them: whoever puts batches together on each rank.

    Ours pads to the canvas of the whole group, which the plan knows. More padding is more zeros in the statistics.
    """
    data = trainer.recipe.data

    def crop(_: nn.Module, arguments: tuple[Batch]) -> None:
        batch = arguments[0]
        if len(batch.sizes):
            height, width = canvas_of((int(batch.sizes[:, 0].max()), int(batch.sizes[:, 1].max())), data)
            batch.pixels = batch.pixels[:, :, :height, :width]

    trainer.model.register_forward_pre_hook(crop)


def _norms(trainer: Trainer) -> list[CrossDeviceBatchNorm]:
    return [module for module in trainer.model.modules() if isinstance(module, CrossDeviceBatchNorm)]


HABITS = {
    rank_local_normalizers: ("losses divided by the samples on the rank, averaged over ranks", "bn-all"),
    broadcast_buffers: ("running statistics of rank 0, broadcast", "base"),
    seeds_of_ranks: ("sampling seeded by rank", "base"),
    local_batch_norm: ("batch norm over the images on the rank", "bn-all"),
    own_canvas: ("images padded to the largest on the rank", "bn-all"),
}
"""Each habit, in words, and the case on which it is shown: bn-all splits one group of 16 images, base has four of 4."""


def main() -> None:
    recipe = load_recipe("verify")
    table = Table("habit", "images a BN group", "gradient of step 1", f"weights after {STEPS} steps", "buffers")
    ours = [(None, ("ours", case)) for case in ("base", "bn-all")]
    for habit, (words, case) in [*ours, *HABITS.items()]:
        row = verify(recipe, (1, 2), cases=(case,), steps=STEPS, break_with=habit).rows[-1]
        group = recipe.bn_size if case == "base" else recipe.batch_size
        table.add_row(words, str(group), *(f"{row.of_kind[kind]:.1e}" for kind in ("gradient", "weights", "buffers")))
    console = Console(width=120)
    console.print(f"Relative difference of 2 devices from 1, float64, torch {torch.__version__.split('+')[0]}:")
    console.print(table)


if __name__ == "__main__":
    main()
