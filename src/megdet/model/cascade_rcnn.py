"""Cascade R-CNN (Cai and Vasconcelos, 2018): three box heads one after another, each trained for better boxes.

Each stage refines the boxes of the stage before, for all classes alike, and has a higher IoU threshold for positives.
RoIs are sampled once, for the first stage (by a hash of their anchors, or the hardest); later stages learn from the
same RoIs, refined.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megdet.architecture import CascadeMaskRcnn as CascadeMaskRcnnRecipe
from megdet.architecture import CascadeRcnn as CascadeRcnnRecipe
from megdet.distributed.lane import SINGLE_LANE, Lane
from megdet.layers.convert import norm_factory
from megdet.model.box_head import BoxHead, Pool
from megdet.model.detector import Count
from megdet.model.faster_rcnn import FasterRcnn
from megdet.model.mask_rcnn import MaskRcnn
from megdet.model.proposals import Proposals
from megdet.model.repeated_looks import Look, Looked
from megdet.model.roi_head import DELTA_WEIGHTS, Outputs, SampledRois
from megdet.ops.boxes import Weights, clip_boxes, decode_boxes
from megdet.ops.roi_align import FeatureTable
from megdet.recipe import RecomputePlan
from megdet.structures import Targets

STAGES = ("box_head", "box_head_2", "box_head_3")
"""Names of the box heads, in the order of the stages."""


class CascadeRcnn(FasterRcnn):
    """Faster R-CNN with three box heads; each has one regressor for all classes."""

    loss_names = (
        *("rpn_objectness", "rpn_box"),
        *(f"{stage}_{term}" for stage in STAGES for term in ("class", "box")),
    )
    counts = (FasterRcnn.counts[0], *(Count(f"{stage}_positive", "RoI") for stage in STAGES))
    parts: Mapping[str, str] = {
        **FasterRcnn.parts,
        "box_head_2": "second box head",
        "box_head_3": "third box head",
    }
    class_layers = tuple(f"{stage}.classes" for stage in STAGES)
    small_start: Mapping[str, float] = {
        **FasterRcnn.small_start,
        **{f"{stage}.{layer}": 20 for stage in STAGES for layer in ("classes", "deltas")},
    }
    sampling_keys = (*FasterRcnn.sampling_keys, "cascade.positive_ious")

    def __init__(
        self,
        architecture: CascadeRcnnRecipe | CascadeMaskRcnnRecipe,
        num_classes: int,
        lane: Lane | None = SINGLE_LANE,
        recompute_plan: RecomputePlan = "none",
    ) -> None:
        super().__init__(architecture, num_classes, lane, recompute_plan)
        first, channels = architecture.box_head, architecture.fpn.channels
        ious = (first.positive_iou, *architecture.cascade.positive_ious)
        for number, (stage, iou) in enumerate(zip(STAGES, ious, strict=True), start=1):
            head = BoxHead(
                replace(first, positive_iou=iou),
                channels,
                num_classes,
                norm_factory(first.norm, lane),
                delta_weights=stage_weights(number),
                is_class_agnostic=True,
            )
            self.add_module(stage, head)
        self.loss_weights = architecture.cascade.loss_weights
        self.smallest = architecture.rpn.min_size

    @property
    def heads(self) -> list[BoxHead]:
        """The box heads of the stages."""
        return [getattr(self, stage) for stage in STAGES]

    def roi_losses(
        self,
        table: FeatureTable,
        sampled: SampledRois,
        seen: Outputs | None,
        targets: Targets,
        sizes: Int64[Tensor, "images 2"],
    ) -> dict[str, Float[Tensor, " images"]]:
        """The losses and counts of all stages, by name: the first stage at the sampled RoIs, the next at refined ones.

        `seen` is the output of the first head for the RoIs, if it was computed already.
        """
        losses = {}
        for stage, head, weight in zip(STAGES, self.heads, self.loss_weights, strict=True):
            logits, deltas = seen or self.refine(table, sizes, sampled.boxes, sampled.is_valid, head)
            seen = None
            found = head.losses(logits, deltas, sampled)
            losses[f"{stage}_class"] = weight * found["box_head_class"]
            losses[f"{stage}_box"] = weight * found["box_head_box"]
            losses[f"{stage}_positive"] = found["box_head_positive"]
            if stage != STAGES[-1]:
                boxes, is_valid = self.moved(head, deltas, sampled.boxes, sampled.is_valid, sizes)
                sampled = self.heads[STAGES.index(stage) + 1].match(boxes, is_valid, targets)
        return losses

    def last_stage(
        self, table: FeatureTable, proposals: Proposals, sizes: Int64[Tensor, "images 2"]
    ) -> tuple[BoxHead, Look, Proposals]:
        """The last head and the boxes that the stages before it refined; scores are the mean over all heads."""
        *earlier, last = self.heads
        for head in earlier:
            _, deltas = self.refine(table, sizes, proposals.boxes, proposals.is_valid, head)
            boxes, is_valid = self.moved(head, deltas, proposals.boxes, proposals.is_valid, sizes)
            proposals = replace(proposals, boxes=boxes, is_valid=is_valid)

        def look(boxes: Tensor, is_valid: Tensor) -> Looked:
            pool = _pooled(partial(self.pooling, table, boxes))
            around = {name: _pooled(own) for name, own in self.around(table, sizes, boxes).items()}
            looks = [head(pool, is_valid, around=around) for head in self.heads]
            scores = torch.stack([logits.to(boxes.dtype).softmax(2) for logits, _ in looks]).mean(0)
            return scores, looks[-1][1].to(boxes.dtype)

        return last, look, proposals

    @torch.no_grad()
    def moved(
        self,
        head: BoxHead,
        deltas: Float[Tensor, "images rois 1 4"],
        boxes: Float[Tensor, "images rois 4"],
        is_valid: Bool[Tensor, "images rois"],
        sizes: Int64[Tensor, "images 2"],
    ) -> tuple[Float[Tensor, "images rois 4"], Bool[Tensor, "images rois"]]:
        """The boxes that a stage refined, clipped to the image, and which of them have area; the others are 0."""
        found = clip_boxes(decode_boxes(deltas.squeeze(2), boxes, head.delta_weights), sizes)
        is_valid = is_valid & ((found[..., 2:] - found[..., :2]) >= self.smallest).all(2)
        return found.masked_fill(~is_valid.unsqueeze(2), 0), is_valid


class CascadeMaskRcnn(MaskRcnn, CascadeRcnn):
    """Cascade R-CNN with the mask head of Mask R-CNN, which learns from the samples of the first stage.

    MaskRcnn adds the mask branch, CascadeRcnn does the rest. The first stage has the most positives to learn from (Cai
    and Vasconcelos, 2019, compare the stages); masks of detections are made for the boxes of the last stage.
    """

    loss_names = (*CascadeRcnn.loss_names, "mask_head")
    counts = CascadeRcnn.counts
    parts: Mapping[str, str] = {**CascadeRcnn.parts, **MaskRcnn.parts}
    class_layers = (*CascadeRcnn.class_layers, "mask_head.logits")
    small_start: Mapping[str, float] = {**CascadeRcnn.small_start, **MaskRcnn.small_start}
    same_meaning = MaskRcnn.same_meaning
    sampling_keys = CascadeRcnn.sampling_keys


def stage_weights(number: int) -> Weights:
    """The factors of a stage's deltas, as in detectron2: corrections get smaller from stage to stage."""
    x, y, width, height = (number * weight for weight in DELTA_WEIGHTS)
    return x, y, width, height


def _pooled(pool: Pool) -> Pool:
    """A `Pool` that pools once and returns the same features to every caller."""
    pooled = pool()
    return lambda: pooled
