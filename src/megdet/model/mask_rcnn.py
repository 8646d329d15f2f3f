"""Mask R-CNN (He et al., 2017): Faster R-CNN with another branch, which finds a mask for every box."""

from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Float, Int64
from torch import Tensor

from megdet.architecture import CascadeMaskRcnn as CascadeMaskRcnnRecipe
from megdet.architecture import MaskRcnn as MaskRcnnRecipe
from megdet.distributed.lane import SINGLE_LANE, Lane
from megdet.layers.convert import norm_factory
from megdet.model.faster_rcnn import FasterRcnn
from megdet.model.mask_head import MaskHead
from megdet.model.proposals import Proposals
from megdet.model.roi_head import Outputs, SampledRois
from megdet.ops.roi_align import FeatureTable
from megdet.recipe import RecomputePlan
from megdet.structures import BatchDetections, Targets


class MaskRcnn(FasterRcnn):
    """Faster R-CNN whose second stage also learns masks from the positive samples, and finds one for each detection."""

    loss_names = (*FasterRcnn.loss_names, "mask_head")
    has_masks = True
    parts: Mapping[str, str] = {**FasterRcnn.parts, "mask_head": "mask head"}
    class_layers = (*FasterRcnn.class_layers, "mask_head.logits")
    small_start: Mapping[str, float] = {**FasterRcnn.small_start, "mask_head.logits": 20}
    same_meaning = (
        *FasterRcnn.same_meaning,
        *("mask_head.pool_size", "mask_head.sampling_ratio", "mask_head.aligned"),
    )

    def __init__(
        self,
        architecture: MaskRcnnRecipe | CascadeMaskRcnnRecipe,
        num_classes: int,
        lane: Lane | None = SINGLE_LANE,
        recompute_plan: RecomputePlan = "none",
    ) -> None:
        super().__init__(architecture, num_classes, lane, recompute_plan)
        own, channels = architecture.mask_head, architecture.fpn.channels
        norm, strides = norm_factory(own.norm, lane), self.pooling.strides
        self.mask_head = MaskHead(own, architecture.box_head, channels, num_classes, norm, strides)

    @property
    def exact_paste(self) -> bool:
        """Whether masks are pasted at the exact boxes, not at boxes rounded to whole pixels."""
        return self.mask_head.recipe.exact_paste

    def roi_losses(
        self,
        table: FeatureTable,
        sampled: SampledRois,
        seen: Outputs | None,
        targets: Targets,
        sizes: Int64[Tensor, "images 2"],
    ) -> dict[str, Float[Tensor, " images"]]:
        """The losses and counts of the second stage at its sampled RoIs, by name."""
        assert targets.masks is not None, "the loader makes them for a detector that has masks"
        losses = super().roi_losses(table, sampled, seen, targets, sizes)
        return losses | self.mask_head.losses(table, sampled, targets.masks, sizes, self.recompute)

    def roi_detections(
        self, table: FeatureTable, proposals: Proposals, sizes: Int64[Tensor, "images 2"]
    ) -> BatchDetections:
        """The detections of the second stage at the proposals, with masks."""
        found = super().roi_detections(table, proposals, sizes)
        return replace(found, masks=self.mask_head.masks(table, found))
