"""The detector: backbone, pyramid, RPN and box head in the order of the figure."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor, nn

from megdet.distributed.lane import SINGLE_LANE, Lane
from megdet.layers.convert import exchange_norms, norm_factory
from megdet.layers.recompute import plainly, recompute
from megdet.model.anchors import AnchorGrid
from megdet.model.backbone import Backbone
from megdet.model.box_head import BoxHead
from megdet.model.fpn import Fpn
from megdet.model.rpn import Rpn
from megdet.ops.constants import constant
from megdet.ops.roi_align import feature_table
from megdet.recipe import Recipe
from megdet.structures import Batch, Detections, Targets

LOSSES = ("rpn_objectness", "rpn_box", "box_head_class", "box_head_box")
"""The terms of l(x, w) in Eq. 1, by name."""

DENSE_PARTS = ("backbone", "fpn", "rpn")
"""The parts whose forward does the same arithmetic for every image of a canvas."""


class Detector(nn.Module):
    """An FPN Faster R-CNN. It is given its lane and asks nothing else about devices."""

    def __init__(self, recipe: Recipe, num_classes: int, lane: Lane = SINGLE_LANE) -> None:
        super().__init__()
        self.recipe, self.num_classes = recipe, num_classes
        bn_size = recipe.bn_size
        self.backbone = Backbone(
            recipe.backbone,
            lambda model: exchange_norms(model, recipe.backbone.norm, bn_size, lane),
            recipe.recompute,
        )
        self.recompute = recompute if recipe.recompute != "none" else plainly
        channels = recipe.fpn.channels
        self.fpn = Fpn(
            self.backbone.channels,
            channels,
            norm_factory(recipe.fpn.norm, bn_size, lane),
            has_norm=recipe.fpn.norm != "none",
        )
        self.anchors = AnchorGrid(recipe.anchors)
        self.rpn = Rpn(recipe.rpn, channels, self.anchors.per_cell, norm_factory(recipe.rpn.norm, bn_size, lane))
        self.box_head = BoxHead(
            recipe.box_head, channels, num_classes, norm_factory(recipe.box_head.norm, bn_size, lane)
        )
        self.compiled: dict[str, Callable[..., Any]] = {}
        """what training calls instead of the forward of some of the DENSE_PARTS"""

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, " images"]]:
        """Every loss of each image (LOSSES) and counts of positive samples; in training mode."""
        images = self.normalized(batch.pixels, batch.sizes)
        return self.losses(images, batch.sizes, batch.targets)

    def normalized(
        self,
        pixels: UInt8[Tensor, "images 3 height width"] | Float32[Tensor, "images 3 height width"],
        sizes: Int64[Tensor, "images 2"],
    ) -> Float[Tensor, "images 3 height width"]:
        """Subtract the mean, divide by the deviation, and set the canvas outside each image to 0."""
        dtype = self.fpn.lateral[0][0].weight.dtype  # type: ignore[index]
        data = self.recipe.data
        mean = constant(data.mean, dtype, pixels.device).reshape(3, 1, 1) * 255
        std = constant(data.std, dtype, pixels.device).reshape(3, 1, 1) * 255
        y = torch.arange(pixels.shape[2], device=pixels.device).reshape(1, -1, 1) < sizes[:, :1].unsqueeze(2)
        x = torch.arange(pixels.shape[3], device=pixels.device).reshape(1, 1, -1) < sizes[:, 1:].unsqueeze(2)
        images = (pixels.to(dtype) - mean) / std * (y & x).unsqueeze(1)
        return images.contiguous(memory_format=torch.channels_last)

    def losses(
        self,
        images: Float[Tensor, "images 3 height width"],
        sizes: Int64[Tensor, "images 2"],
        targets: Targets,
    ) -> dict[str, Float[Tensor, " images"]]:
        """The losses of normalised images."""
        targets = replace(targets, boxes=targets.boxes.to(images.dtype))
        backbone, fpn, rpn = (self.compiled.get(name, getattr(self, name)) for name in DENSE_PARTS)
        pyramid = self.recompute(fpn, backbone(images))
        anchors = self.anchors_of(images, pyramid)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.rpn.is_sparse):
            logits, deltas = rpn(pyramid)
        proposals = self.rpn.propose(logits, deltas, anchors, sizes)
        table = feature_table(pyramid)
        losses: dict[str, Tensor] = self.rpn.losses(logits, deltas, anchors, targets, table)
        sampled = self.box_head.sample(proposals, targets)
        class_logits, class_deltas = self.box_head(table, sampled.boxes, sampled.is_valid, self.recompute)
        return losses | self.box_head.losses(class_logits, class_deltas, sampled)

    @torch.no_grad()
    def detect(self, images: Float[Tensor, "images 3 height width"], sizes: Int64[Tensor, "images 2"]) -> Detections:
        """What is on normalised images; in evaluation mode."""
        pyramid = self.fpn(self.backbone(images))
        logits, deltas = self.rpn(pyramid)
        proposals = self.rpn.propose(logits, deltas, self.anchors_of(images, pyramid), sizes)
        if not images.is_cuda:  # a GPU would have to wait, a CPU computes every row
            proposals = proposals.shortened(least=self.recipe.box_head.detections)
        class_logits, class_deltas = self.box_head(feature_table(pyramid), proposals.boxes, proposals.is_valid)
        return self.box_head.detections(class_logits, class_deltas, proposals, sizes)

    def anchors_of(self, images: Tensor, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """The anchors of each level, (anchors, 4) in pixels, for normalised images and their feature pyramid."""
        canvas = (images.shape[2], images.shape[3])
        grids = [(level.shape[2], level.shape[3]) for level in pyramid]
        return self.anchors(canvas, grids, images.dtype, images.device)
