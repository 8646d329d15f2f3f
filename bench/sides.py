"""Both sides of a comparison with a detector of torchvision's, made of one recipe, so that they do the same work.

A side is named by what it is: `torchvision fp32`, `torchvision channels_last`, `torchvision channels_last bf16`,
`megdet fp32`, `megdet bf16`, on a GPU also `megdet tf32` and `megdet compiled`.
"""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torchvision
from real_step import real_step
from torch import nn

from megdet import SPIN_COUNT, runtime
from megdet.data.masks import PlacedMask
from megdet.data.transforms import make_masks
from megdet.distributed.world import start_world
from megdet.model.detector import Detector
from megdet.model.torchvision_weights import convert_torchvision_weights, torchvision_recipe
from megdet.precision import arithmetic, backward
from megdet.recipe import Recipe
from megdet.structures import Masks

NUM_CLASSES = 80
BOXES = 8
"""of an image"""
RATE, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 1e-4


def start_side(name: str) -> torch.device:
    """The device of a side. A process's first side decides about its allocator: torchvision's has glibc's habits."""
    if not name.startswith("megdet"):
        runtime.keep_freed_memory = lambda: None
    return start_world().device


def environment_of(name: str) -> dict[str, str]:
    """Of a side's process: threads that wait do so as MegDet lets them (`SPIN_COUNT`), or as torch does by itself."""
    environment = dict(os.environ)
    if not name.startswith("megdet") and environment.get("GOMP_SPINCOUNT") == str(SPIN_COUNT):
        del environment["GOMP_SPINCOUNT"]
    return environment


def use_cudnn(name: str) -> None:
    """cuDNN's flags before a side's step: ours repeats itself to the bit; torchvision has torch's, or its fastest.

    Without a GPU they do nothing.
    """
    is_ours = name.startswith("megdet")
    torch.backends.cudnn.deterministic = is_ours
    torch.backends.cudnn.benchmark = not is_ours and "channels_last" in name


def shared_recipe(batch: int, precision: str = "float32", kind: str = "faster_rcnn") -> Recipe:
    """torchvision's architecture and numbers, with every weight and batch norm trained over the whole mini-batch."""
    recipe = torchvision_recipe(replace(Recipe(), precision=precision), 1e-5, THEIRS[kind][0])
    optimizer = replace(recipe.optimizer, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    model = replace(recipe.model, backbone=replace(recipe.model.backbone, frozen_stages=0))
    return replace(recipe, batch_size=batch, bn_size=batch, model=model, optimizer=optimizer)


def torchvision_detector(recipe: Recipe, height: int, width: int) -> nn.Module:
    """torchvision's detector with the recipe's numbers; its own resizing leaves images of this size as they are."""
    name, numbers = THEIRS[recipe.model.kind]
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models.detection, name)(
        weights=None,
        weights_backbone=None,  # without trained weights every layer and every batch norm is trained
        num_classes=NUM_CLASSES + 1,
        min_size=min(height, width),
        max_size=max(height, width),
        **numbers(recipe.model),
    )
    return model


def _two_stage_numbers(model: Any) -> dict[str, Any]:
    rpn, head = model.rpn, model.box_head
    return {
        "rpn_pre_nms_top_n_train": rpn.train_proposals_before_nms,
        "rpn_post_nms_top_n_train": rpn.train_proposals,
        "rpn_pre_nms_top_n_test": rpn.test_proposals_before_nms,
        "rpn_post_nms_top_n_test": rpn.test_proposals,
        "rpn_nms_thresh": rpn.nms_iou,
        "rpn_fg_iou_thresh": rpn.positive_iou,
        "rpn_bg_iou_thresh": rpn.negative_iou,
        "rpn_batch_size_per_image": rpn.samples,
        "rpn_positive_fraction": rpn.positive_fraction,
        "box_score_thresh": head.score_threshold,
        "box_nms_thresh": head.nms_iou,
        "box_detections_per_img": head.detections,
        "box_fg_iou_thresh": head.positive_iou,
        "box_bg_iou_thresh": head.positive_iou,
        "box_batch_size_per_image": head.samples,
        "box_positive_fraction": head.positive_fraction,
    }


def _retinanet_numbers(model: Any) -> dict[str, Any]:
    head = model.head
    return {
        "score_thresh": head.score_threshold,
        "nms_thresh": head.nms_iou,
        "detections_per_img": head.detections,
        "fg_iou_thresh": head.positive_iou,
        "bg_iou_thresh": head.negative_iou,
        "topk_candidates": head.candidates,
    }


THEIRS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "faster_rcnn": ("fasterrcnn_resnet50_fpn", _two_stage_numbers),
    "mask_rcnn": ("maskrcnn_resnet50_fpn", _two_stage_numbers),
    "retinanet": ("retinanet_resnet50_fpn", _retinanet_numbers),
}
"""torchvision's detector of each kind, and its arguments for the numbers of a recipe's."""


def copy_weights(source: nn.Module, model: Detector) -> None:
    """Give our detector torchvision's weights, so that both have the same candidates to suppress and to sample."""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    converted = convert_torchvision_weights(dict(source.state_dict()), wanted)
    model.load_state_dict({**model.state_dict(), **converted})


def training_step(
    name: str,
    recipe: Recipe,
    images: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    prepare: Callable[[Detector], object] = lambda _: None,
) -> Callable[[], object]:
    """A whole training step of a side on images from 0 to 1: forward, backward and SGD, from the same weights.

    Args:
        name: of the side; its precision, where it is ours, is the recipe's.
        recipe: for both sides.
        images: (batch, 3, height, width) on the device.
        boxes: (batch, boxes, 4) in pixels; a detector with masks learns the ellipse in each.
        labels: (batch, boxes), from 0.
        prepare: what happens to our detector before its first step.
    """
    height, width = images.shape[2:]
    theirs = torchvision_detector(recipe, height, width)
    pixels = ellipses(boxes, height, width) if recipe.model.kind == "mask_rcnn" else None
    if name.startswith("megdet"):

        def with_weights(model: Detector) -> None:
            copy_weights(theirs, model)
            prepare(model)

        masks = None if pixels is None else packed(pixels, boxes)
        step = real_step(images, boxes, labels, NUM_CLASSES, recipe, with_weights, masks)
    else:
        step = _torchvision_step(name, theirs, recipe.precision, images, boxes, labels, pixels)

    def with_flags() -> object:
        use_cudnn(name)
        return step()

    return with_flags


def ellipses(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The pixels of the ellipse in each box, (batch, boxes, height, width)."""
    x1, y1, x2, y2 = boxes[..., None, None].unbind(2)
    y, x = (torch.arange(edge, device=boxes.device) + 0.5 for edge in (height, width))
    return ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y[:, None] - y1 - y2) / (y2 - y1)) ** 2 <= 1


def packed(pixels: torch.Tensor, boxes: torch.Tensor) -> Masks:
    """Masks of whole images, each in a frame around its box, as the loader gives them."""
    placed = []
    for own, frames in zip(pixels.cpu(), boxes.cpu(), strict=True):
        edges = [(int(x1), int(y1), math.ceil(x2), math.ceil(y2)) for x1, y1, x2, y2 in frames.tolist()]
        rows = zip(own, edges, strict=True)
        placed.append([PlacedMask(x1, y1, mask[y1:y2, x1:x2].numpy()) for mask, (x1, y1, x2, y2) in rows])
    return make_masks(placed, boxes.shape[1]).to(boxes.device)


def _torchvision_step(
    name: str,
    model: nn.Module,
    precision: str,
    images: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    pixels: torch.Tensor | None,
) -> Callable[[], object]:
    """The step of torchvision's reference script."""
    model.to(images.device)
    if "channels_last" in name:
        model = model.to(memory_format=torch.channels_last)
    targets = [{"boxes": b, "labels": label + 1} for b, label in zip(boxes, labels, strict=True)]
    if pixels is not None:
        targets = [target | {"masks": own.to(torch.uint8)} for target, own in zip(targets, pixels, strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def step() -> None:
        optimizer.zero_grad()
        with arithmetic(precision, images.device):
            loss = sum(model(list(images), targets).values())
        backward(loss, precision)
        optimizer.step()

    return step
