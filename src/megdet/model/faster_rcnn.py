"""Faster R-CNN on a feature pyramid: backbone, pyramid, RPN and box head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megdet.architecture import TwoStage
from megdet.distributed.lane import SINGLE_LANE, Lane
from megdet.layers.convert import norm_factory
from megdet.model.anchors import AnchorGrid
from megdet.model.box_head import IMAGE, BoxHead, Pool
from megdet.model.detector import BACKBONE_MEANING, Count, Detector, Samples
from megdet.model.fpn import Fpn
from megdet.model.hard_rois import choose_rois
from megdet.model.pooling import RoiPooling
from megdet.model.proposals import Proposals
from megdet.model.regions import region_boxes
from megdet.model.repeated_looks import Look, Looked, detections_of_looks
from megdet.model.roi_head import Outputs, SampledRois
from megdet.model.rpn import Rpn
from megdet.model.segmentation import Segmentation
from megdet.ops.roi_align import FeatureTable, feature_table
from megdet.recipe import RecomputePlan
from megdet.structures import BatchDetections, Targets


@dataclass
class Proposed:
    """The proposals of the first stage, and the outputs that its loss needs."""

    proposals: Proposals
    logits: list[Float[Tensor, "images _"]]
    deltas: list[Float[Tensor, "images _ 4"]]
    anchors: list[Float[Tensor, "_ 4"]]


def with_dense_loss(architecture: Any) -> Any:
    """The `recipe.model` of a detector with an RPN whose loss is computed on dense maps."""
    return replace(architecture, rpn=replace(architecture.rpn, sparse_loss=False))


class FasterRcnn(Detector):
    """Features, proposals, and a second stage for every proposal; the subclasses change the second stage."""

    loss_names: tuple[str, ...] = ("rpn_objectness", "rpn_box", "box_head_class", "box_head_box")
    counts: ClassVar[tuple[Count, ...]] = (
        Count("rpn_positive", "anchor", "rpn.samples"),
        Count("box_head_positive", "RoI"),
    )
    parts: Mapping[str, str] = {"backbone": "backbone", "fpn": "FPN", "rpn": "RPN", "box_head": "box head"}
    dense_parts: tuple[str, ...] = ("backbone", "fpn", "rpn")
    class_layers: tuple[str, ...] = ("box_head.classes", "box_head.deltas")
    small_start: Mapping[str, float] = {
        "rpn.objectness": 10,
        "rpn.deltas": 10,
        "box_head.classes": 20,
        "box_head.deltas": 20,
    }
    same_meaning: ClassVar[tuple[str, ...]] = (
        *BACKBONE_MEANING,
        *("anchors.sizes", "anchors.ratios", "anchors.stride_from_grid", "anchors.whole_pixels"),
        *("box_head.pool_size", "box_head.sampling_ratio", "box_head.aligned", "box_head.canonical_size"),
        "box_head.maxout",
    )
    sampling_keys: ClassVar[tuple[str, ...]] = (
        *("anchors.sizes", "anchors.ratios", "anchors.stride_from_grid", "anchors.whole_pixels"),
        *("rpn.samples", "rpn.positive_fraction", "rpn.positive_iou", "rpn.negative_iou"),
        *("rpn.train_proposals_before_nms", "rpn.train_proposals", "rpn.nms_iou", "rpn.min_size"),
        *("box_head.samples", "box_head.positive_fraction", "box_head.positive_iou"),
        *("box_head.sampling", "box_head.hard_nms_iou"),
    )
    equal_variants: ClassVar[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {
        "dense-rpn": ("the RPN's loss on dense maps", with_dense_loss)
    }

    def __init__(
        self,
        architecture: TwoStage,
        num_classes: int,
        lane: Lane | None = SINGLE_LANE,
        recompute_plan: RecomputePlan = "none",
    ) -> None:
        super().__init__(architecture, num_classes, lane, recompute_plan)
        fpn, rpn, box_head = architecture.fpn, architecture.rpn, architecture.box_head
        self.fpn = Fpn(
            self.backbone.channels,
            fpn.channels,
            norm_factory(fpn.norm, lane),
            has_norm=fpn.norm != "none",
            large_kernel=fpn.large_kernel,
        )
        strides = (*self.backbone.strides, 2 * self.backbone.strides[-1])
        self.anchors = AnchorGrid(architecture.anchors, strides)
        self.rpn = Rpn(rpn, fpn.channels, self.anchors.per_cell, norm_factory(rpn.norm, lane))
        self.pooling = RoiPooling(
            box_head.pool_size,
            box_head.sampling_ratio,
            box_head.aligned,
            box_head.canonical_size,
            strides,
            two_levels=box_head.maxout,
        )
        self.box_head = BoxHead(box_head, fpn.channels, num_classes, norm_factory(box_head.norm, lane))
        self.segmentation: Segmentation | None = None
        own = architecture.segmentation
        if own.enabled:
            norm = norm_factory(own.norm, lane)
            self.segmentation = Segmentation(own, fpn.channels, strides, num_classes, norm)
            self.loss_names = (*self.loss_names, "segmentation")
            self.parts = {**self.parts, "segmentation": "segmentation branch"}
            self.dense_parts = (*self.dense_parts, "segmentation")
            self.class_layers = (*self.class_layers, "segmentation.classes")
            self.small_start = {**self.small_start, "segmentation.classes": 10}

    def features(self, images: Float[Tensor, "images 3 height width"]) -> list[Float[Tensor, "images channels _ _"]]:
        """The pyramid of normalised images, P2 to P6."""
        return self.pyramid_and_segments(images)[0]

    def pyramid_and_segments(
        self, images: Float[Tensor, "images 3 height width"]
    ) -> tuple[list[Float[Tensor, "images channels _ _"]], Float[Tensor, "images _ _ _"] | None]:
        """The pyramid of normalised images, and the logits of the segmentation branch if there is one."""
        backbone, fpn = self.dense_part("backbone"), self.dense_part("fpn")
        pyramid: list[Tensor] = self.recompute(fpn, backbone(images))
        if self.segmentation is None:
            return pyramid, None
        told: tuple[list[Tensor], Tensor] = self.recompute(self.dense_part("segmentation"), pyramid)
        return told

    def propose(
        self,
        pyramid: list[Float[Tensor, "images channels _ _"]],
        canvas: tuple[int, int],
        sizes: Int64[Tensor, "images 2"],
    ) -> Proposed:
        """The first stage: proposals on a canvas of this height and width.

        Its logits and deltas carry no gradient if the loss is computed at the sampled anchors only (sparse form).
        """
        anchors = self.anchors_of(pyramid, canvas)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.rpn.is_sparse):
            logits, deltas = self.dense_part("rpn")(pyramid)
        return Proposed(self.rpn.propose(logits, deltas, anchors, sizes), logits, deltas, anchors)

    def refine(
        self,
        table: FeatureTable,
        sizes: Int64[Tensor, "images 2"],
        boxes: Float[Tensor, "images rois 4"],
        is_valid: Bool[Tensor, "images rois"],
        head: BoxHead | None = None,
    ) -> Outputs:
        """The second stage (or the stage of `head`): class logits, background last, and deltas of every class.

        Invalid rows are meaningless.
        """
        pool, around = partial(self.pooling, table, boxes), self.around(table, sizes, boxes)
        logits, deltas = (head or self.box_head)(pool, is_valid, self.recompute, around)
        return logits.to(boxes.dtype), deltas.to(boxes.dtype)

    def around(
        self, table: FeatureTable, sizes: Int64[Tensor, "images 2"], boxes: Float[Tensor, "images rois 4"]
    ) -> dict[str, Pool]:
        """The regions that the box heads use besides RoIs, by name, pooled when called."""
        recipe = self.box_head.recipe
        pools: dict[str, Pool] = {
            name: partial(self.pooling, table, region_boxes(name, boxes, sizes)) for name in recipe.regions
        }
        if recipe.global_context:
            pools[IMAGE] = partial(self.pooling.of_images, table, sizes)
        return pools

    def roi_losses(
        self,
        table: FeatureTable,
        sampled: SampledRois,
        seen: Outputs | None,
        targets: Targets,  # noqa: ARG002  # what other kinds add to the second stage needs more
        sizes: Int64[Tensor, "images 2"],
    ) -> dict[str, Float[Tensor, " images"]]:
        """The losses and counts of the second stage at its sampled RoIs, by name.

        `seen` is the output of the box head for them, if it was computed already.
        """
        logits, deltas = seen or self.refine(table, sizes, sampled.boxes, sampled.is_valid)
        return self.box_head.losses(logits, deltas, sampled)

    def roi_detections(
        self, table: FeatureTable, proposals: Proposals, sizes: Int64[Tensor, "images 2"]
    ) -> BatchDetections:
        """The detections of the second stage at the proposals."""
        head, look, proposals = self.last_stage(table, proposals, sizes)
        return detections_of_looks(head, look, proposals, sizes)

    def last_stage(
        self, table: FeatureTable, proposals: Proposals, sizes: Int64[Tensor, "images 2"]
    ) -> tuple[BoxHead, Look, Proposals]:
        """The head that makes the detections, the function that runs it on boxes, and the first boxes for it."""

        def look(boxes: Tensor, is_valid: Tensor) -> Looked:
            logits, deltas = self.refine(table, sizes, boxes, is_valid)
            return logits.softmax(2), deltas

        return self.box_head, look, proposals

    def losses(
        self,
        images: Float[Tensor, "images 3 height width"],
        sizes: Int64[Tensor, "images 2"],
        targets: Targets,
    ) -> dict[str, Float[Tensor, " images"]]:
        """The losses and counts of normalised images, by name."""
        targets = replace(targets, boxes=targets.boxes.to(images.dtype))
        pyramid, segments = self.pyramid_and_segments(images)
        found = self.propose(pyramid, _canvas(images), sizes)
        table = feature_table(pyramid)
        losses = self.rpn.losses(found.logits, found.deltas, found.anchors, targets, table)
        if self.segmentation is not None and segments is not None:
            losses["segmentation"] = self.segmentation.loss(segments, targets, sizes)
        sampled, seen = choose_rois(self.box_head, partial(self.refine, table, sizes), found.proposals, targets)
        return losses | self.roi_losses(table, sampled, seen, targets, sizes)

    @torch.no_grad()
    def detect(
        self, images: Float[Tensor, "images 3 height width"], sizes: Int64[Tensor, "images 2"]
    ) -> BatchDetections:
        """The detections on normalised images; in evaluation mode."""
        pyramid = self.features(images)
        proposals = self.propose(pyramid, _canvas(images), sizes).proposals
        proposals = proposals.shortened(least=self.box_head.recipe.detections)
        return self.roi_detections(feature_table(pyramid), proposals, sizes)

    @torch.no_grad()
    def samples(
        self, images: Float[Tensor, "images 3 height width"], sizes: Int64[Tensor, "images 2"], targets: Targets
    ) -> Samples:
        """The RoIs on which the box head's loss of normalised images is computed."""
        targets = replace(targets, boxes=targets.boxes.to(images.dtype))
        pyramid = self.features(images)
        proposals = self.propose(pyramid, _canvas(images), sizes).proposals
        look = partial(self.refine, feature_table(pyramid), sizes)
        sampled, _ = choose_rois(self.box_head, look, proposals, targets)
        return Samples(sampled.boxes, sampled.is_positive, sampled.is_valid)

    def anchors_of(self, pyramid: Sequence[Tensor], canvas: tuple[int, int]) -> list[Tensor]:
        """The anchors of each level, (anchors, 4) in pixels, for a feature pyramid of this canvas."""
        grids = [(level.shape[2], level.shape[3]) for level in pyramid]
        return self.anchors(canvas, grids, next(self.parameters()).dtype, pyramid[0].device)


def _canvas(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]
