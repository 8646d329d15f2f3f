"""R-FCN (Dai et al., 2016): an RPN on C4, and position-sensitive maps of a dilated C5, which RoIs only average."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megdet.architecture import Rfcn as RfcnRecipe
from megdet.distributed.lane import SINGLE_LANE, Lane
from megdet.layers.convert import norm_factory
from megdet.model.anchors import AnchorGrid
from megdet.model.detector import BACKBONE_MEANING, Detector, Samples
from megdet.model.faster_rcnn import FasterRcnn, Proposed, with_dense_loss
from megdet.model.hard_rois import choose_rois
from megdet.model.light_head import LightHead
from megdet.model.position_sensitive_head import PositionSensitiveHead
from megdet.model.proposals import Proposals
from megdet.model.repeated_looks import Look, Looked, detections_of_looks
from megdet.model.roi_head import SampledRois
from megdet.model.rpn import Rpn
from megdet.ops.roi_align import feature_table
from megdet.recipe import RecomputePlan
from megdet.structures import BatchDetections, Targets


class Rfcn(Detector):
    """Features and maps, proposals, and for every proposal a vote or a light head.

    Differs from the paper: the RPN's hidden layer is as wide as C4, not 512 channels. The paper trains on the RoIs of
    greatest loss; here that is `box_head.sampling` hard, which is not the default.
    """

    loss_names = FasterRcnn.loss_names
    counts = FasterRcnn.counts
    parts: Mapping[str, str] = {"backbone": "backbone", "rpn": "RPN", "box_head": "score maps"}
    dense_parts = ("backbone", "rpn", "box_head")
    class_layers = ("box_head.classes",)
    small_start: Mapping[str, float] = FasterRcnn.small_start
    same_meaning = (
        *BACKBONE_MEANING,
        *("anchors.sizes", "anchors.ratios", "anchors.stride_from_grid", "anchors.whole_pixels"),
        *("box_head.pool_size", "box_head.sampling_ratio"),
    )
    map_norms = ("backbone", "rpn", "box_head")
    sampling_keys = FasterRcnn.sampling_keys
    equal_variants: ClassVar[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {
        "dense-rpn": ("the RPN's loss on dense maps", with_dense_loss)
    }

    def __init__(
        self,
        architecture: RfcnRecipe,
        num_classes: int,
        lane: Lane | None = SINGLE_LANE,
        recompute_plan: RecomputePlan = "none",
    ) -> None:
        super().__init__(architecture, num_classes, lane, recompute_plan)
        rpn, box_head = architecture.rpn, architecture.box_head
        (*_, c4, c5), (*_, stride, stride_of_maps) = self.backbone.channels, self.backbone.strides
        self.anchors = AnchorGrid(architecture.anchors, (stride,))
        self.rpn = Rpn(rpn, c4, self.anchors.per_cell, norm_factory(rpn.norm, lane))
        norm = norm_factory(box_head.norm, lane)
        head = LightHead if box_head.light_kernel else PositionSensitiveHead
        self.box_head: LightHead | PositionSensitiveHead = head(box_head, c5, stride_of_maps, num_classes, norm)

    def features(self, images: Float[Tensor, "images 3 height width"]) -> list[Float[Tensor, "images _ _ _"]]:
        """C4 of normalised images, and the maps of classes and boxes made from C5."""
        _, _, c4, c5 = self.dense_part("backbone")(images)
        return [c4, *self.recompute(self.dense_part("box_head"), c5)]

    def propose(
        self,
        c4: Float[Tensor, "images _ _ _"],
        images: Float[Tensor, "images 3 height width"],
        sizes: Int64[Tensor, "images 2"],
    ) -> Proposed:
        """The first stage: proposals on the canvas of these images.

        Its logits and deltas carry no gradient if the loss is computed at the sampled anchors only (sparse form).
        """
        canvas, grid = (images.shape[2], images.shape[3]), (c4.shape[2], c4.shape[3])
        anchors = self.anchors(canvas, [grid], next(self.parameters()).dtype, c4.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.rpn.is_sparse):
            logits, deltas = self.dense_part("rpn")([c4])
        return Proposed(self.rpn.propose(logits, deltas, anchors, sizes), logits, deltas, anchors)

    def losses(
        self,
        images: Float[Tensor, "images 3 height width"],
        sizes: Int64[Tensor, "images 2"],
        targets: Targets,
    ) -> dict[str, Float[Tensor, " images"]]:
        """The losses and counts of normalised images, by name."""
        targets = replace(targets, boxes=targets.boxes.to(images.dtype))
        c4, *maps = self.features(images)
        found = self.propose(c4, images, sizes)
        losses = self.rpn.losses(found.logits, found.deltas, found.anchors, targets, feature_table([c4]))
        sampled = self.chosen(maps, found.proposals, targets)
        logits, deltas = self.box_head.vote(maps, sampled.boxes)
        return losses | self.box_head.losses(logits, deltas, sampled)

    @torch.no_grad()
    def detect(
        self, images: Float[Tensor, "images 3 height width"], sizes: Int64[Tensor, "images 2"]
    ) -> BatchDetections:
        """The detections on normalised images; in evaluation mode."""
        c4, *maps = self.features(images)
        proposals = self.propose(c4, images, sizes).proposals
        proposals = proposals.shortened(least=self.box_head.recipe.detections)
        return detections_of_looks(self.box_head, self.look_at(maps), proposals, sizes)

    def look_at(self, maps: list[Float[Tensor, "images _ _ _"]]) -> Look:
        """A function that runs the second stage on boxes of these maps."""

        def look(boxes: Tensor, is_valid: Tensor) -> Looked:  # noqa: ARG001  # rows without a box mean nothing
            logits, deltas = self.box_head.vote(maps, boxes)
            return logits.softmax(2), deltas

        return look

    @torch.no_grad()
    def samples(
        self, images: Float[Tensor, "images 3 height width"], sizes: Int64[Tensor, "images 2"], targets: Targets
    ) -> Samples:
        """The RoIs on which the second stage's loss of normalised images is computed."""
        targets = replace(targets, boxes=targets.boxes.to(images.dtype))
        c4, *maps = self.features(images)
        sampled = self.chosen(maps, self.propose(c4, images, sizes).proposals, targets)
        return Samples(sampled.boxes, sampled.is_positive, sampled.is_valid)

    def chosen(self, maps: list[Float[Tensor, "images _ _ _"]], proposals: Proposals, targets: Targets) -> SampledRois:
        """The RoIs of the second stage's loss; a vote for one does not depend on the others."""
        chosen, _ = choose_rois(self.box_head, lambda boxes, _: self.box_head.vote(maps, boxes), proposals, targets)
        return chosen
