"""Trained weights of torchvision's `fasterrcnn_resnet50_fpn` in our detector: same image, same detections."""

from dataclasses import replace

import torch
from torch import Tensor

from megdet.errors import InputError
from megdet.recipe import Anchors, Backbone, BoxHead, Fpn, Recipe, Rpn

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


def torchvision_recipe(base: Recipe, norm_eps: float) -> Recipe:
    """`base` with the architecture of torchvision's detector, its frozen norms, anchors, RoIAlign and resizing."""
    return replace(
        base,
        bn_size=0,
        data=replace(base.data, resize="torchvision"),
        backbone=Backbone(name="resnet50", norm="batch", norm_eps=norm_eps, frozen_stages=2),
        fpn=Fpn(),
        anchors=Anchors(stride_from_grid=True),
        rpn=Rpn(train_proposals=2000),
        box_head=BoxHead(aligned=False),
    )


def num_torchvision_classes(tensors: dict[str, Tensor]) -> int:
    """Classes without background. Raises InputError when the tensors are of another model."""
    try:
        return tensors["roi_heads.box_predictor.cls_score.weight"].shape[0] - 1
    except KeyError:
        raise InputError(
            "the file holds no roi_heads.box_predictor.cls_score.weight: it is not a state dict of "
            "torchvision.models.detection.fasterrcnn_resnet50_fpn"
        ) from None


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
        if new == "box_head.fc1.weight":
            bins = wanted[new].shape[1] // 256
            tensor = tensor.reshape(len(tensor), 256, bins).transpose(1, 2).flatten(1)
        elif new.startswith("box_head.classes."):
            tensor = torch.cat([tensor[1:], tensor[:1]])
        elif new.startswith("box_head.deltas."):
            tensor = tensor[4:] if len(tensor) == 4 * (num_classes + 1) else tensor
        converted[new] = tensor
    left_over = next((name for name in converted if name not in wanted), None)
    if left_over is not None:
        raise InputError(f"the detector has no place for the file's {left_over}: the file is of another model")
    for name, tensor in wanted.items():
        if name not in converted:
            raise InputError(f"the file has no tensor for {name}: it is of another model")
        if converted[name].shape != tensor.shape:
            raise InputError(
                f"the tensor for {name} has shape {tuple(converted[name].shape)}, not {tuple(tensor.shape)}: "
                "the file is of another model"
            )
    return {name: converted[name].contiguous() for name in wanted}
