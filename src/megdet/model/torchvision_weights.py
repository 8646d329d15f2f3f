"""Converts trained weights of torchvision's detectors: same image, same detections."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from megdet.architecture import FasterRcnn, MaskRcnn, RetinaNet
from megdet.architecture_heads import BoxHead, MaskHead
from megdet.architecture_parts import Anchors, Backbone, DenseHead, Fpn, NormKind, OctaveAnchors, Rpn, StridedFpn
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
_MASKS: _Renamed = (
    *((f"roi_heads.mask_head.{i}.0.", f"mask_head.convolutions.{i}.") for i in range(4)),
    *((f"roi_heads.mask_head.{i}.1.", f"mask_head.norms.{i}.") for i in range(4)),
    *((f"roi_heads.mask_head.mask_fcn{i + 1}.", f"mask_head.convolutions.{i}.") for i in range(4)),  # COCO_V1 and older
    ("roi_heads.mask_predictor.conv5_mask.", "mask_head.upsample."),
    ("roi_heads.mask_predictor.mask_fcn_logits.", "mask_head.logits."),
)
_TOWERS = (("classification_head", "class_tower", "cls_logits"), ("regression_head", "delta_tower", "bbox_reg"))
_DENSE: _Renamed = (
    ("backbone.fpn.extra_blocks.", "fpn."),
    *((f"head.{theirs}.{predicts}.", f"{ours}.predict.") for theirs, ours, predicts in _TOWERS),
    *((f"head.{theirs}.conv.{i}.0.", f"{ours}.convolutions.{i}.") for theirs, ours, _ in _TOWERS for i in range(4)),
    *((f"head.{theirs}.conv.{i}.1.", f"{ours}.norms.{i}.") for theirs, ours, _ in _TOWERS for i in range(4)),
    # COCO_V1 and other files from before torchvision 0.13 number the activations too
    *((f"head.{theirs}.conv.{2 * i}.", f"{ours}.convolutions.{i}.") for theirs, ours, _ in _TOWERS for i in range(4)),
)
_CHANNELS = Fpn().channels


def _faster_rcnn(base: Recipe, norm_eps: float) -> Recipe:
    """Faster R-CNN: frozen norms in the backbone, no others."""
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


def _architecture_v2(base: Recipe, norm_eps: float) -> FasterRcnn:
    return replace(
        _architecture(base, norm_eps),
        fpn=Fpn(norm="batch"),
        rpn=Rpn(convolutions=2, train_proposals=2000),
        box_head=BoxHead(convolutions=4, layers=1, norm="batch", aligned=False),
    )


def _with_masks(model: FasterRcnn, norm: NormKind) -> MaskRcnn:
    own = {name: value for name, value in vars(model).items() if name != "kind"}
    return MaskRcnn(**own, mask_head=MaskHead(norm=norm, aligned=False, exact_paste=False))


def _resized(recipe: Recipe) -> Recipe:
    return replace(recipe, data=replace(recipe.data, resize="torchvision"))


def _faster_rcnn_v2(base: Recipe, norm_eps: float) -> Recipe:
    """Faster R-CNN v2: batch norm in backbone, pyramid and heads, which need batch statistics to train further."""
    bn_size = base.bn_size or base.batch_size
    return _resized(replace(base, bn_size=bn_size, model=_architecture_v2(base, norm_eps)))


def _mask_rcnn(base: Recipe, norm_eps: float) -> Recipe:
    """Mask R-CNN: `_faster_rcnn` with masks."""
    recipe = _faster_rcnn(base, norm_eps)
    return replace(recipe, model=_with_masks(_architecture(base, norm_eps), "none"))


def _mask_rcnn_v2(base: Recipe, norm_eps: float) -> Recipe:
    """Mask R-CNN v2: `_faster_rcnn_v2` with masks."""
    recipe = _faster_rcnn_v2(base, norm_eps)
    return replace(recipe, model=_with_masks(_architecture_v2(base, norm_eps), "batch"))


def _retinanet(base: Recipe, norm_eps: float) -> Recipe:
    """RetinaNet: frozen norms in the backbone, no others; P6 from P5."""
    return _with_towers(_faster_rcnn(base, norm_eps), StridedFpn(p6_from="p5"), DenseHead(detections=300))


def _retinanet_v2(base: Recipe, norm_eps: float) -> Recipe:
    """RetinaNet v2: frozen norms in the backbone, group norm in the head; P6 from C5, GIoU loss for boxes."""
    head = DenseHead(norm="group", box_loss="giou", detections=300)
    return _with_towers(_faster_rcnn(base, norm_eps), StridedFpn(p6_from="c5"), head)


def _with_towers(recipe: Recipe, fpn: StridedFpn, head: DenseHead) -> Recipe:
    """The recipe with RetinaNet on the recipe's backbone."""
    model = RetinaNet(
        mean=recipe.model.mean,
        std=recipe.model.std,
        backbone=recipe.model.backbone,
        fpn=fpn,
        anchors=OctaveAnchors(whole_sizes=True, stride_from_grid=True),
        head=head,
    )
    return replace(recipe, model=model)


@dataclass(frozen=True)
class Classes:
    """The tensor whose rows tell how many classes a detector has; rows of the background come first."""

    name: str
    per_class: int
    """number of rows of a class"""
    row: tuple[int, ...]
    """the shape of a row"""

    def number(self, tensors: dict[str, Tensor]) -> int:
        """Classes without background. Raises InputError for a shape that is not of this detector."""
        shape = tuple(tensors[self.name].shape) if self.name in tensors else ()
        rows = shape[0] if shape else 0
        if shape[1:] != self.row or rows % self.per_class or rows < 2 * self.per_class:
            first = "classes + 1" if self.per_class == 1 else f"{self.per_class} * (classes + 1)"
            wanted = ", ".join([first, *map(str, self.row)])
            raise InputError(f"tensor {self.name} has shape {shape}, not ({wanted}): the file is of another model")
        return rows // self.per_class - 1


_OF_ROIS = Classes("roi_heads.box_predictor.cls_score.weight", 1, (BoxHead().channels,))
_OF_ANCHORS = Classes("head.classification_head.cls_logits.weight", 9, (_CHANNELS, 3, 3))


@dataclass(frozen=True)
class Layout:
    """A detector of torchvision: the names of its tensors, and its recipe."""

    mark: str
    """a tensor that no earlier detector in the table has"""
    renamed: _Renamed
    """prefixes of its names, and the prefixes here"""
    recipe: Callable[[Recipe, float], Recipe]
    """makes the recipe from a base recipe and the eps of the backbone's norms: architecture and resizing are set"""
    classes: Classes = _OF_ROIS


LAYOUTS = {
    "fasterrcnn_resnet50_fpn": Layout(
        "roi_heads.box_head.fc6.weight", _PYRAMID + _RPN + _TWO_LAYERS + _PREDICTOR, _faster_rcnn
    ),
    "fasterrcnn_resnet50_fpn_v2": Layout(
        "roi_heads.box_head.5.weight", _PYRAMID + _RPN + _CONVOLVED + _PREDICTOR, _faster_rcnn_v2
    ),
    "maskrcnn_resnet50_fpn": Layout(
        "roi_heads.mask_predictor.mask_fcn_logits.weight",
        _PYRAMID + _RPN + _TWO_LAYERS + _PREDICTOR + _MASKS,
        _mask_rcnn,
    ),
    "maskrcnn_resnet50_fpn_v2": Layout(
        "roi_heads.mask_head.0.1.weight", _PYRAMID + _RPN + _CONVOLVED + _PREDICTOR + _MASKS, _mask_rcnn_v2
    ),
    "retinanet_resnet50_fpn": Layout(_OF_ANCHORS.name, _PYRAMID + _DENSE, _retinanet, _OF_ANCHORS),
    "retinanet_resnet50_fpn_v2": Layout(
        "head.classification_head.conv.0.1.weight", _PYRAMID + _DENSE, _retinanet_v2, _OF_ANCHORS
    ),
}
"""The layouts by function name in torchvision.models.detection; a file has the last one whose mark it contains."""


def layout_of(tensors: dict[str, Tensor]) -> Layout:
    """The layout of a file. Raises InputError if it is not of a known torchvision detector."""
    found = [layout for layout in LAYOUTS.values() if layout.mark in tensors]
    if not found:
        names = ", ".join(LAYOUTS)
        raise InputError(f"the file is not a state dict of a detector of torchvision.models.detection: {names}")
    return found[-1]


def torchvision_recipe(base: Recipe, norm_eps: float, name: str = "fasterrcnn_resnet50_fpn") -> Recipe:
    """`base` with the architecture, norms, anchors, RoIAlign and resizing of a torchvision detector."""
    return LAYOUTS[name].recipe(base, norm_eps)


def num_torchvision_classes(tensors: dict[str, Tensor]) -> int:
    """Classes without background. Raises InputError when the tensors are of another model."""
    return layout_of(tensors).classes.number(tensors)


def convert_torchvision_weights(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for MegDet's detector, with names and shapes of `wanted`, from one of torchvision.

    Torchvision has the background first, also predicts boxes for it, and flattens pooled features channel by channel.
    Raises InputError with the first tensor that is missing, left over or of another shape.
    """
    layout = layout_of(tensors)
    num_classes = layout.classes.number(tensors)
    converted = {}
    for name, tensor in tensors.items():
        new = next(
            (ours + name.removeprefix(theirs) for theirs, ours in layout.renamed if name.startswith(theirs)), None
        )
        if new is not None and new.startswith(("fpn.lateral.", "fpn.output.")) and new.count(".") == 3:
            level, kind = new.split(".")[2:]  # files from before torchvision 0.13 lack the inner index
            new = f"{new.rsplit('.', 2)[0]}.{level}.0.{kind}"
        if new is None:
            known = next(name for name, own in LAYOUTS.items() if own is layout)
            raise InputError(f"tensor {name} has no place in a {known}: the file is of another model")
        if new.endswith("num_batches_tracked") and new not in wanted:
            continue  # frozen statistics have no such counter
        converted[new] = _without_background(new, tensor, num_classes)
    return {name: _rearranged(name, tensor).contiguous() for name, tensor in fitted(converted, wanted).items()}


def _without_background(name: str, tensor: Tensor, num_classes: int) -> Tensor:
    """A tensor without torchvision's background rows; the softmax of a box head keeps its background, as the last."""
    rows = len(tensor) if tensor.dim() else 0
    if name.startswith("box_head.deltas.") and rows == 4 * (num_classes + 1):
        return tensor[4:]
    if name.startswith("mask_head.logits.") and rows == num_classes + 1:
        return tensor[1:].flatten(1) if tensor.dim() > 1 else tensor[1:]
    if name.startswith("class_tower.predict.") and rows and rows % (num_classes + 1) == 0:
        return tensor.reshape(-1, num_classes + 1, *tensor.shape[1:])[:, 1:].flatten(0, 1)
    return tensor


def _rearranged(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the right shape with its values in MegDet's order."""
    if name == "box_head.fc1.weight":
        return bin_by_bin(tensor, _CHANNELS)
    if name.startswith("box_head.classes."):
        return torch.cat([tensor[1:], tensor[:1]])
    return tensor


def bin_by_bin(weight: Float[Tensor, "outputs inputs"], channels: int) -> Float[Tensor, "outputs inputs"]:
    """The weight of a layer for pooled features channel by channel, rearranged for features bin by bin."""
    return weight.reshape(len(weight), channels, -1).transpose(1, 2).flatten(1)
