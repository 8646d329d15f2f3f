"""Trained weights of torchvision's `fasterrcnn_resnet50_fpn` in our detector: same image, same detections."""

from dataclasses import replace

import torch
from torch import Tensor

from megdet.architecture import Anchors, Backbone, BoxHead, FasterRcnn, Fpn, Rpn
from megdet.errors import InputError
from megdet.model.weight_file import misfit
from megdet.recipe import Recipe

_RENAMED = (
    ("backbone.body.", "backbone.body."),
    ("backbone.fpn.inner_blocks.", "fpn.lateral."),
    ("backbone.fpn.layer_blocks.", "fpn.output."),
    ("rpn.head.conv.0.0.", "rpn.conv."),
    ("rpn.head.cls_logits.", "rpn.objectness."),
    ("rpn.head.bbox_pred.", "rpn.deltas."),
    ("roi_heads.box_head.fc6.", "box_head.fc1."),
    ("roi_heads.box_head.fc7.", "box_head.fc2."),
    ("roi_heads.box_predictor.cls_score.", "box_head.classes."),
    ("roi_heads.box_predictor.bbox_pred.", "box_head.deltas."),
)
_CHANNELS = Fpn().channels


def torchvision_recipe(base: Recipe, norm_eps: float) -> Recipe:
    """`base` with the architecture of torchvision's detector, its frozen norms, anchors, RoIAlign and resizing."""
    return replace(
        base,
        bn_size=0,
        data=replace(base.data, resize="torchvision"),
        model=FasterRcnn(
            mean=base.model.mean,
            std=base.model.std,
            backbone=Backbone(name="resnet50", norm="batch", norm_eps=norm_eps, frozen_stages=2),
            anchors=Anchors(stride_from_grid=True),
            rpn=Rpn(train_proposals=2000),
            box_head=BoxHead(aligned=False),
        ),
    )


def num_torchvision_classes(tensors: dict[str, Tensor]) -> int:
    """Classes without background. Raises InputError when the tensors are of another model."""
    name = "roi_heads.box_predictor.cls_score.weight"
    if name not in tensors:
        raise InputError(
            f"the file holds no {name}: it is not a state dict of torchvision.models.detection.fasterrcnn_resnet50_fpn"
        )
    shape = tuple(tensors[name].shape)
    channels = BoxHead().channels
    if len(shape) != 2 or shape[0] < 2 or shape[1] != channels:
        raise InputError(
            f"tensor {name} has shape {shape}, not (classes + 1, {channels}): the file is of another model"
        )
    return shape[0] - 1


def convert_torchvision_weights(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of our detector, with names and shapes of `wanted`, from torchvision's.

    Torchvision has the background first, boxes for it too, and flattens pooled features channel by channel.
    Raises InputError with the first tensor that is missing, left over or of another shape.
    """
    num_classes = num_torchvision_classes(tensors)
    converted = {}
    for name, tensor in tensors.items():
        new = next((ours + name.removeprefix(theirs) for theirs, ours in _RENAMED if name.startswith(theirs)), None)
        if new is not None and new.startswith("fpn.") and new.count(".") == 3:
            level, kind = new.split(".")[2:]  # files from before torchvision 0.13 lack the inner index
            new = f"{new.rsplit('.', 2)[0]}.{level}.0.{kind}"
        if new is None and name.startswith("rpn.head.conv."):
            new = "rpn.conv." + name.removeprefix("rpn.head.conv.")
        if new is None:
            raise InputError(
                f"tensor {name} has no place in a ResNet-50 FPN Faster R-CNN: the file is of another model"
            )
        if new.endswith("num_batches_tracked"):
            continue
        if new.startswith("box_head.deltas.") and tensor.dim() and len(tensor) == 4 * (num_classes + 1):
            tensor = tensor[4:]
        converted[new] = tensor
    left_over = next((name for name in converted if name not in wanted), None)
    if left_over is not None:
        raise InputError(f"the detector has no place for the file's {left_over}: the file is of another model")
    for name, tensor in wanted.items():
        if name not in converted:
            raise InputError(f"the file has no tensor for {name}: it is of another model")
        fault = misfit(name, converted[name], tensor)
        if fault:
            raise InputError(f"{fault}: the file is of another model")
    return {name: _rearranged(name, converted[name]).contiguous() for name in wanted}


def _rearranged(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the right shape with its values in our order."""
    if name == "box_head.fc1.weight":
        return tensor.reshape(len(tensor), _CHANNELS, -1).transpose(1, 2).flatten(1)
    if name.startswith("box_head.classes."):
        return torch.cat([tensor[1:], tensor[:1]])
    return tensor
