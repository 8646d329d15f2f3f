"""Converts trained weights of detectron2's detectors, by its documented names and conventions.

detectron2 feeds images as BGR, so the input channels of the first convolution are reversed. Its anchors are not
rounded, its RoIAlign takes a sample for each pixel, and MSRA ResNets have their strides in the 1 x 1 convolutions.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megdet.architecture import FasterRcnn, MaskRcnn, Model, RetinaNet
from megdet.architecture_heads import BoxHead, MaskHead
from megdet.architecture_parts import Anchors, Backbone, DenseHead, Fpn, OctaveAnchors, Rpn, StridedFpn
from megdet.errors import InputError
from megdet.model.torchvision_weights import bin_by_bin
from megdet.model.weight_file import fitted
from megdet.recipe import Recipe

_MEAN_BGR = (103.53, 116.28, 123.675)
_LEFT_OUT = re.compile(r"pixel_(mean|std)|(proposal_generator\.)?anchor_generator\.cell_anchors\.\d")
"""Tensors in files that are not weights: constants of the preprocessing, and anchors in old files."""

_Renamed = tuple[tuple[str, Callable[[re.Match[str]], str] | str], ...]
_RESNET: _Renamed = (
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.", "backbone.body.bn1."),
    (r"backbone\.bottom_up\.stem\.conv1\.", "backbone.body.conv1."),
    (
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.conv([1-3])\.norm\.",
        lambda m: f"backbone.body.layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}.",
    ),
    (
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.conv([1-3])\.",
        lambda m: f"backbone.body.layer{int(m[1]) - 1}.{m[2]}.conv{m[3]}.",
    ),
    (
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.shortcut\.norm\.",
        lambda m: f"backbone.body.layer{int(m[1]) - 1}.{m[2]}.downsample.1.",
    ),
    (
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.shortcut\.",
        lambda m: f"backbone.body.layer{int(m[1]) - 1}.{m[2]}.downsample.0.",
    ),
)
_FPN: _Renamed = ((r"backbone\.fpn_(lateral|output)([2-5])\.", lambda m: f"fpn.{m[1]}.{int(m[2]) - 2}.0."),)
_RPN: _Renamed = (
    (r"proposal_generator\.rpn_head\.conv\.", "rpn.conv."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn.objectness."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.deltas."),
)
_BOX_HEAD: _Renamed = (
    (r"roi_heads\.box_head\.fc([12])\.", lambda m: f"box_head.fc{m[1]}."),
    (r"roi_heads\.box_predictor\.cls_score\.", "box_head.classes."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "box_head.deltas."),
)
_MASKS: _Renamed = (
    (r"roi_heads\.mask_head\.mask_fcn([1-4])\.", lambda m: f"mask_head.convolutions.{int(m[1]) - 1}."),
    (r"roi_heads\.mask_head\.deconv\.", "mask_head.upsample."),
    (r"roi_heads\.mask_head\.predictor\.", "mask_head.logits."),
)
_DENSE_FPN: _Renamed = (
    (r"backbone\.fpn_(lateral|output)([3-5])\.", lambda m: f"fpn.{m[1]}.{int(m[2]) - 3}.0."),
    (r"backbone\.top_block\.(p[67])\.", lambda m: f"fpn.{m[1]}."),
)
_DENSE: _Renamed = (
    (r"head\.cls_subnet\.([0246])\.", lambda m: f"class_tower.convolutions.{int(m[1]) // 2}."),
    (r"head\.bbox_subnet\.([0246])\.", lambda m: f"delta_tower.convolutions.{int(m[1]) // 2}."),
    (r"head\.cls_score\.", "class_tower.predict."),
    (r"head\.bbox_pred\.", "delta_tower.predict."),
)
_CHANNELS = Fpn().channels
_MEAN = (_MEAN_BGR[2] / 255, _MEAN_BGR[1] / 255, _MEAN_BGR[0] / 255)
_STD = (1 / 255, 1 / 255, 1 / 255)
_RESNET50 = Backbone(name="resnet50", stride_in_1x1=True, frozen_stages=2)
_DENSE_ANCHORS = OctaveAnchors(whole_pixels=False)
_ANCHORS_OF_A_CELL = _DENSE_ANCHORS.scales_per_octave * len(_DENSE_ANCHORS.ratios)


def _faster_rcnn() -> FasterRcnn:
    return FasterRcnn(
        mean=_MEAN,
        std=_STD,
        backbone=_RESNET50,
        anchors=Anchors(whole_pixels=False),
        rpn=Rpn(smooth_l1_beta=0.0, min_size=1e-9),
        box_head=BoxHead(sampling_ratio=0, smooth_l1_beta=0.0),
    )


def _mask_rcnn() -> MaskRcnn:
    own = {name: value for name, value in vars(_faster_rcnn()).items() if name != "kind"}
    return MaskRcnn(**own, mask_head=MaskHead(sampling_ratio=0))


def _retinanet() -> RetinaNet:
    return RetinaNet(
        mean=_MEAN, std=_STD, backbone=_RESNET50, fpn=StridedFpn(p6_from="c5"), anchors=_DENSE_ANCHORS, head=DenseHead()
    )


@dataclass(frozen=True)
class Layout:
    """A detector of detectron2: the names of its tensors, and its architecture."""

    mark: str
    """a tensor that no earlier detector in the table has"""
    classes: str
    """the bias whose length tells the number of classes"""
    rows_of: Callable[[int], int]
    """the length of that bias for a number of classes"""
    renamed: _Renamed
    """patterns for the beginnings of its names, and the names here"""
    architecture: Callable[[], Model]


_OF_ROIS = "roi_heads.box_predictor.cls_score.bias"
_OF_ANCHORS = "head.cls_score.bias"

LAYOUTS = {
    "R50-FPN Faster R-CNN": Layout(
        _OF_ROIS, _OF_ROIS, lambda classes: classes + 1, _RESNET + _FPN + _RPN + _BOX_HEAD, _faster_rcnn
    ),
    "R50-FPN Mask R-CNN": Layout(
        "roi_heads.mask_head.predictor.bias",
        _OF_ROIS,
        lambda classes: classes + 1,
        _RESNET + _FPN + _RPN + _BOX_HEAD + _MASKS,
        _mask_rcnn,
    ),
    "R50-FPN RetinaNet": Layout(
        _OF_ANCHORS,
        _OF_ANCHORS,
        lambda classes: _ANCHORS_OF_A_CELL * classes,
        _RESNET + _DENSE_FPN + _DENSE,
        _retinanet,
    ),
}
"""The layouts by name; a file has the last one whose mark it contains."""


def detectron2_layout(tensors: dict[str, Tensor]) -> Layout:
    """The layout of a file. Raises InputError if it is not of a known detectron2 detector."""
    found = [layout for layout in LAYOUTS.values() if layout.mark in tensors]
    if not found:
        raise InputError(f"the file is not of a known detectron2 model: {', '.join(LAYOUTS)}")
    return found[-1]


def detectron2_recipe(base: Recipe, layout: Layout) -> Recipe:
    """`base` with the architecture, frozen norms, pixel normalisation and resizing of a detectron2 detector."""
    return replace(base, bn_size=0, data=replace(base.data, resize="antialias"), model=layout.architecture())


def num_detectron2_classes(tensors: dict[str, Tensor]) -> int:
    """Classes without background. Raises InputError when the tensors are of another model."""
    layout = detectron2_layout(tensors)
    shape = tuple(tensors[layout.classes].shape) if layout.classes in tensors else ()
    first, second = layout.rows_of(0), layout.rows_of(1)
    classes, rest = divmod(shape[0] - first, second - first) if len(shape) == 1 else (0, 0)
    if classes < 1 or rest:
        raise InputError(f"tensor {layout.classes} has shape {shape}, not one of classes: the file is of another model")
    return classes


def convert_detectron2_weights(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for MegDet's detector, with names and shapes of `wanted`, from one of detectron2.

    As here, detectron2 has the background last; it flattens pooled features channel by channel. Raises InputError with
    the first tensor that is missing, left over or of another shape, and if the pixel mean is another.
    """
    _check_pixels(tensors)
    renamed = detectron2_layout(tensors).renamed
    converted = {}
    for name, tensor in tensors.items():
        if _LEFT_OUT.fullmatch(name) or name.endswith("num_batches_tracked"):
            continue
        new = next((re.sub(f"^{theirs}", ours, name) for theirs, ours in renamed if re.match(theirs, name)), None)
        if new is None:
            raise InputError(f"tensor {name} has no place in the detector: the file is of another model")
        # their 1 x 1 convolution is a linear layer here
        converted[new] = tensor.flatten(1) if new == "mask_head.logits.weight" and tensor.dim() > 1 else tensor
    return {name: _rearranged(name, tensor).contiguous() for name, tensor in fitted(converted, wanted).items()}


def _check_pixels(tensors: dict[str, Tensor]) -> None:
    """Refuse a file whose pixel mean or deviation is not that of the models with MSRA ResNets."""
    for name, expected in (("pixel_mean", _MEAN_BGR), ("pixel_std", (1.0, 1.0, 1.0))):
        found = tensors.get(name)
        if found is None:
            continue
        values = found.flatten().double()
        if values.shape != (3,) or (values - torch.tensor(expected).double()).abs().max() > 1e-2:
            raise InputError(
                f"tensor {name} is {values.tolist()[:3]}, not {list(expected)}: the file is of a model for other pixels"
            )


def _rearranged(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the right shape with its values in MegDet's order."""
    if name == "backbone.body.conv1.weight":
        return tensor.flip(1)  # BGR to RGB
    if name == "box_head.fc1.weight":
        return bin_by_bin(tensor, _CHANNELS)
    if name.startswith(("class_tower.predict.", "delta_tower.predict.")):
        # anchors of a cell: detectron2 has size by size, each with its ratios; here it is ratio by ratio
        sizes = _DENSE_ANCHORS.scales_per_octave
        rows = tensor.reshape(sizes, _ANCHORS_OF_A_CELL // sizes, -1, *tensor.shape[1:])
        return rows.transpose(0, 1).flatten(0, 2)
    return tensor
