"""Trained weights of torchvision's detectors in ours: same image, same detections."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from megdet.architecture import Anchors, Backbone, BoxHead, FasterRcnn, Fpn, Rpn
from megdet.errors import InputError
from megdet.model.weight_file import fitted
from megdet.recipe import Recipe

_Renamed = tuple[tuple[str, str], ...]
_PYRAMID: _Renamed = (
    ("backbone.body.", "backbone.body."),
    ("backbone.fpn.inner_blocks.", "fpn.lateral."),
    ("backbone.fpn.layer_blocks.", "fpn.output."),
)
_RPN: _Renamed = (
    ("rpn.head.conv.0.0.", "rpn.conv."),
    ("rpn.head.conv.1.0.", "rpn.conv2."),
    ("rpn.head.conv.", "rpn.conv."),  # files from before torchvision 0.13
    ("rpn.head.cls_logits.", "rpn.objectness."),
    ("rpn.head.bbox_pred.", "rpn.deltas."),
)
_TWO_LAYERS: _Renamed = (("roi_heads.box_head.fc6.", "box_head.fc1."), ("roi_heads.box_head.fc7.", "box_head.fc2."))
_CONVOLVED: _Renamed = (
    *((f"roi_heads.box_head.{i}.", f"box_head.convolutions.{i}.") for i in range(4)),
    ("roi_heads.box_head.5.", "box_head.fc1."),
)
_PREDICTOR: _Renamed = (
    ("roi_heads.box_predictor.cls_score.", "box_head.classes."),
    ("roi_heads.box_predictor.bbox_pred.", "box_head.deltas."),
)
_CHANNELS = Fpn().channels


def _faster_rcnn(base: Recipe, norm_eps: float) -> Recipe:
    """Frozen norms in the backbone, none behind it."""
    return _resized(replace(base, bn_size=0, model=_architecture(base, norm_eps)))


def _architecture(base: Recipe, norm_eps: float) -> FasterRcnn:
    return FasterRcnn(
        mean=base.model.mean,
        std=base.model.std,
        backbone=Backbone(name="resnet50", norm="batch", norm_eps=norm_eps, frozen_stages=2),
        anchors=Anchors(stride_from_grid=True),
        rpn=Rpn(train_proposals=2000),
        box_head=BoxHead(aligned=False),
    )


def _resized(recipe: Recipe) -> Recipe:
    return replace(recipe, data=replace(recipe.data, resize="torchvision"))


def _faster_rcnn_v2(base: Recipe, norm_eps: float) -> Recipe:
    """Batch norm in the backbone, the pyramid and the box head, which more training needs statistics for."""
    model = replace(
        _architecture(base, norm_eps),
        fpn=Fpn(norm="batch"),
        rpn=Rpn(convolutions=2, train_proposals=2000),
        box_head=BoxHead(convolutions=4, layers=1, norm="batch", aligned=False),
    )
    return _resized(replace(base, bn_size=base.bn_size or base.batch_size, model=model))


@dataclass(frozen=True)
class Layout:
    """How one of torchvision's detectors names its tensors, and what it is as a recipe."""

    mark: str
    """a tensor that no detector before it in the table has"""
    renamed: _Renamed
    """its beginnings of names, and ours"""
    recipe: Callable[[Recipe, float], Recipe]
    """a recipe with its architecture and resizing, of one that says the rest and of the eps of the backbone's norms"""


LAYOUTS = {
    "fasterrcnn_resnet50_fpn": Layout(
        "roi_heads.box_head.fc6.weight", _PYRAMID + _RPN + _TWO_LAYERS + _PREDICTOR, _faster_rcnn
    ),
    "fasterrcnn_resnet50_fpn_v2": Layout(
        "roi_heads.box_head.5.weight", _PYRAMID + _RPN + _CONVOLVED + _PREDICTOR, _faster_rcnn_v2
    ),
}
"""By the name of the function in torchvision.models.detection; the last one whose mark is in a file is the file's."""


def layout_of(tensors: dict[str, Tensor]) -> Layout:
    """The layout of a file. Raises InputError when it is none of torchvision's detectors that are known."""
    found = [layout for layout in LAYOUTS.values() if layout.mark in tensors]
    if not found:
        names = ", ".join(LAYOUTS)
        raise InputError(f"the file is not a state dict of a detector of torchvision.models.detection: {names}")
    return found[-1]


def torchvision_recipe(base: Recipe, norm_eps: float, name: str = "fasterrcnn_resnet50_fpn") -> Recipe:
    """`base` with the architecture of one of torchvision's detectors, its norms, anchors, RoIAlign and resizing."""
    return LAYOUTS[name].recipe(base, norm_eps)


def num_torchvision_classes(tensors: dict[str, Tensor]) -> int:
    """Classes without background. Raises InputError when the tensors are of another model."""
    name = "roi_heads.box_predictor.cls_score.weight"
    if name not in tensors:
        raise InputError(f"the file holds no {name}: it is not a state dict of torchvision's Faster R-CNN")
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
    renamed = layout_of(tensors).renamed
    converted = {}
    for name, tensor in tensors.items():
        new = next((ours + name.removeprefix(theirs) for theirs, ours in renamed if name.startswith(theirs)), None)
        if new is not None and new.startswith("fpn.") and new.count(".") == 3:
            level, kind = new.split(".")[2:]  # files from before torchvision 0.13 lack the inner index
            new = f"{new.rsplit('.', 2)[0]}.{level}.0.{kind}"
        if new is None:
            raise InputError(
                f"tensor {name} has no place in a ResNet-50 FPN Faster R-CNN: the file is of another model"
            )
        if new.endswith("num_batches_tracked") and new not in wanted:
            continue  # where we freeze the statistics
        if new.startswith("box_head.deltas.") and tensor.dim() and len(tensor) == 4 * (num_classes + 1):
            tensor = tensor[4:]
        converted[new] = tensor
    return {name: _rearranged(name, tensor).contiguous() for name, tensor in fitted(converted, wanted).items()}


def _rearranged(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the right shape with its values in our order."""
    if name == "box_head.fc1.weight":
        return bin_by_bin(tensor, _CHANNELS)
    if name.startswith("box_head.classes."):
        return torch.cat([tensor[1:], tensor[:1]])
    return tensor


def bin_by_bin(weight: Float[Tensor, "outputs inputs"], channels: int) -> Float[Tensor, "outputs inputs"]:
    """The weight of a layer that takes pooled features channel by channel, for features bin by bin."""
    return weight.reshape(len(weight), channels, -1).transpose(1, 2).flatten(1)
