"""The step of `megdet train` on images that are made up, a BN group a micro-batch."""

from collections.abc import Callable

import torch

from megdet.distributed.world import start_world
from megdet.inference.trained import place_model
from megdet.model.choice import make_detector
from megdet.model.detector import Detector
from megdet.recipe import Recipe
from megdet.structures import Batch, Masks, Targets
from megdet.training.step import train_step
from megdet.training.trainer import Trainer, trainer_of


def real_step(
    images: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    recipe: Recipe,
    prepare: Callable[[Detector], object] = lambda _: None,
    masks: Masks | None = None,
) -> Callable[[], object]:
    """A whole step of random weights at a rate of 1e-4.

    Args:
        images: (batch, 3, height, width) from 0 to 1, on the device.
        boxes: (batch, boxes, 4) in pixels.
        labels: (batch, boxes).
        num_classes: of the detector.
        recipe: its mini-batch is the images.
        prepare: what happens to the detector before its first step.
        masks: of the boxes, for a detector that learns from them; on the device.
    """
    world, trainer = start_world(), made_trainer(recipe, num_classes, prepare)
    batches = made_batches(images, boxes, labels, recipe, masks)
    return lambda: train_step(trainer, batches, range(len(batches)), 1e-4, 0, world)


def made_trainer(recipe: Recipe, num_classes: int, prepare: Callable[[Detector], object] = lambda _: None) -> Trainer:
    """The trainer of a recipe with random weights, before its first step."""
    world, model = start_world(), make_detector(recipe, num_classes)
    place_model(model, world.device, recipe.precision)
    model.train()
    prepare(model)
    return trainer_of(recipe, model, world)


def made_batches(
    images: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, recipe: Recipe, masks: Masks | None = None
) -> list[Batch]:
    """The groups of a mini-batch; arguments as those of `real_step`."""
    count, group, device = len(images), recipe.images_per_group, images.device
    pixels = (images * 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    sizes = torch.tensor([images.shape[2:]] * group, device=device)
    seeds, scales = torch.arange(count, device=device), torch.ones(group, 2, device=device)
    batches = []
    for start in range(0, count, group):
        own = slice(start, start + group)
        targets = Targets(boxes[own], labels[own], seeds[own], None if masks is None else masks[own])
        batches.append(Batch(pixels[own], sizes, targets, tuple(range(start, start + group)), scales))
    return batches
