"""A small detector of each kind with weights that are not trivial; as a program, it exports some of them.

    python tests/export_kinds.py FOLDER KIND...

writes FOLDER/KIND.onnx and, with .pt2 in place of the kind's end, a program of torch.export. A process of its own: the
checks of shapes that the tests install do not know the sizes of a graph that is being traced.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from factories import SMALL_MASKS, TINY, of_kind, with_model
from megdet.architecture import CascadeMaskRcnn, CascadeRcnn, MaskRcnn, RetinaNet, Rfcn
from megdet.architecture_heads import PositionSensitiveHead
from megdet.architecture_parts import AtrousBackbone, DenseHead, OctaveAnchors, SingleLevelAnchors, StridedFpn
from megdet.inference.trained import TrainedDetector
from megdet.layers.deformable import DeformableConv2d
from megdet.model.choice import make_detector
from megdet.model.detector import Detector
from megdet.recipe import Recipe

CLASSES = ("bolt", "nut", "gear")
_RFCN = Rfcn(
    backbone=AtrousBackbone(name="resnet18", deformable_stages=(5,)),
    anchors=SingleLevelAnchors(sizes=(12.0, 24.0, 48.0)),
    rpn=TINY.model.rpn,
    box_head=PositionSensitiveHead(channels=24, pool_size=3, detections=10, score_threshold=0.01),
)
_RETINANET = RetinaNet(
    backbone=TINY.model.backbone,
    fpn=StridedFpn(channels=16),
    anchors=OctaveAnchors(sizes=(8.0, 16.0, 24.0, 32.0, 48.0)),
    head=DenseHead(convolutions=1, candidates=50, detections=10, score_threshold=0.01, prior=0.1),
)
KINDS: dict[str, Recipe] = {
    "faster_rcnn": TINY,
    "mask_rcnn": of_kind(TINY, MaskRcnn, mask_head=SMALL_MASKS),
    "cascade_rcnn": of_kind(TINY, CascadeRcnn),
    "cascade_mask_rcnn": of_kind(TINY, CascadeMaskRcnn, mask_head=SMALL_MASKS),
    "retinanet": replace(TINY, model=_RETINANET),
    "rfcn": replace(TINY, model=_RFCN),
    "light_head": replace(TINY, model=replace(_RFCN, box_head=replace(_RFCN.box_head, light_kernel=3))),
    "regions": with_model(TINY, box_head={"regions": ("left", "enlarged"), "global_context": True, "maxout": True}),
}
"""Recipes by the kind of detector, or by what is special about it."""


def detector_of(recipe: Recipe, seed: int = 0) -> Detector:
    """A detector in evaluation mode whose every layer counts."""
    torch.manual_seed(seed)
    model = make_detector(recipe, len(CLASSES))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "bias")) and "predict" not in name:
                tensor.normal_(0, 0.1)
            elif not tensor.any() and tensor.dim() == 1:  # the last norm of a block, which silences it
                tensor.uniform_(0.2, 0.5)
        for layer, factor in model.small_start.items():
            model.get_parameter(f"{layer}.weight").mul_(factor)
        for module in model.modules():
            if isinstance(module, DeformableConv2d):
                nn.init.normal_(module.offsets.weight, std=0.02)
    return model.eval()


def trained_of(kind: str, **data: Any) -> TrainedDetector:
    """The same as if it came from a run."""
    recipe = replace(KINDS[kind], data=replace(KINDS[kind].data, **data))
    return TrainedDetector(detector_of(recipe), recipe, CLASSES, (3, 5, 8), 7, torch.device("cpu"))


def write_kinds(folder: Path, kinds: list[str]) -> None:
    """Export detectors."""
    from megdet.export.files import described, write_graph

    for kind in kinds:
        name, _, suffix = kind.partition(".")
        trained = trained_of(name)
        to = "torch-export" if suffix == "pt2" else "onnx"
        write_graph(trained, described(trained, "0" * 64, "0"), to, folder / f"{name}.{suffix or 'onnx'}")


if __name__ == "__main__":
    write_kinds(Path(sys.argv[1]), sys.argv[2:])
