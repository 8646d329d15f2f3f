"""Counts the work and memory of a detector from its modules, on torch's meta device: shapes without numbers.

python -m megdet.planning.counting      # writes the table that counts.py reads
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megdet.distributed.gradients import GradientBuckets
from megdet.distributed.world import World
from megdet.files import write_json_atomically
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.frozen_norm import FrozenBatchNorm
from megdet.model.choice import make_detector
from megdet.model.detector import Detector
from megdet.model.faster_rcnn import FasterRcnn
from megdet.planning.counts import FILE, TILE, Counts, Variant
from megdet.planning.step import Exchange
from megdet.precision import dtype_of
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe

RECIPES: dict[Variant, str] = {"trained": "megdet-r50", "frozen": "megdet-r50-b16-bn0"}
_COCO_CLASSES = 80


def meta_detector(recipe: Recipe, num_classes: int) -> Detector:
    """The detector of a recipe without memory for its numbers.

    Raises InputError if it cannot be built.
    """
    with torch.device("meta"):
        detector = make_detector(recipe, num_classes)
    return detector.to(dtype_of(recipe.precision))


def exchange_of(detector: Detector, *, gathers_sums: bool = False) -> Exchange:
    """What the devices that train a detector send in a step; `gathers_sums` is for CPUs."""
    buckets = GradientBuckets(detector.parameters(), World(0, 1, torch.device("cpu"))).buckets
    return Exchange(
        tuple(sum(p.numel() * p.element_size() for p in bucket) for bucket in buckets),
        tuple(m.channels for m in detector.modules() if isinstance(m, CrossDeviceBatchNorm)),
        next(detector.parameters()).element_size(),
        gathers_sums,
    )


def count(recipe: Recipe) -> Counts:
    """The counts of a recipe's detector on COCO, by one forward and backward on the meta device."""
    detector = meta_detector(recipe, _COCO_CLASSES).train()
    assert isinstance(detector, FasterRcnn), "the paper's"
    normed: list[tuple[int, bool]] = []

    def note(_norm: nn.Module, given: tuple[Any, ...]) -> None:
        normed.append((given[0].numel(), given[0].requires_grad))

    for module in detector.modules():
        if isinstance(module, CrossDeviceBatchNorm | FrozenBatchNorm):
            module.register_forward_pre_hook(note)
    with FlopCounterMode(display=False) as backbone:
        features: list[Tensor] = detector.backbone(torch.zeros(1, 3, TILE, TILE, device="meta"))
    with FlopCounterMode(display=False) as pyramid:
        levels: list[Tensor] = detector.fpn(features)
    with FlopCounterMode(display=False) as rpn:
        detector.rpn(levels)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward([level.sum() for level in levels])
    bins = detector.box_head.recipe.pool_size**2
    head = sum(
        layer.weight.numel() * (bins if isinstance(layer, nn.Conv2d) else 1)
        for layer in detector.box_head.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    )
    normed_backward = sum(values for values, has_gradient in normed if has_gradient)
    left_frozen = sum(feature.numel() for feature in features if not feature.requires_grad)
    return Counts(
        backbone=backbone.get_total_flops(),
        pyramid=pyramid.get_total_flops(),
        rpn=rpn.get_total_flops(),
        backward=backward.get_total_flops(),
        box_head=2 * detector.box_head.recipe.samples * head,
        normed=sum(values for values, _ in normed),
        normed_backward=normed_backward,
        kept=2 * normed_backward + left_frozen + 3 * sum(level.numel() for level in levels),
        exchange=exchange_of(detector),
    )


if __name__ == "__main__":
    table = {variant: asdict(count(load_recipe(name))) for variant, name in RECIPES.items()}
    write_json_atomically(Path(__file__).with_name(FILE), table, indent=1)
