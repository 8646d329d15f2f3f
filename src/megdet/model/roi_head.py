"""The base class of second-stage heads: the RoIs of their loss, the loss, and the detections."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.architecture_heads import RoiHead as RoiHeadRecipe
from megdet.model.proposals import Proposals
from megdet.ops.boxes import Weights, clip_boxes, decode_boxes, encode_boxes
from megdet.ops.losses import box_loss, mean_per_image
from megdet.ops.matching import match_boxes, sample_matches
from megdet.ops.nms import segmented_nms
from megdet.ops.ordering import NEVER, score_keys, top
from megdet.structures import BatchDetections, Targets

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
SMALLEST_DETECTION = 1e-2
_FIRST_TRUTH_IDENTITY = 1 << 40
"""Identities of ground-truth boxes among the proposals start here, above those of all anchors."""
_PURPOSE = 1
"""Salt of the random draw, so that it differs from the RPN's draw of the same anchors."""
Outputs = tuple[Float[Tensor, "images rois classes_and_background"], Float[Tensor, "images rois regressed 4"]]
"""A head's outputs for RoIs: class logits, background last, and deltas for each class or for all together."""


@dataclass
class SampledRois:
    """The RoIs of the loss, a fixed number an image, with their targets."""

    boxes: Float[Tensor, "images samples 4"]
    labels: Int64[Tensor, "images samples"]
    deltas: Float[Tensor, "images samples 4"]
    box_index: Int64[Tensor, "images samples"]
    """the row of the targets that each RoI is matched to; meaningless if it is not positive"""
    is_positive: Bool[Tensor, "images samples"]
    """positive RoIs come first if RoIs were sampled"""
    is_valid: Bool[Tensor, "images samples"]

    def at(self, index: Int64[Tensor, "images chosen"], is_valid: Bool[Tensor, "images chosen"]) -> "SampledRois":
        """The RoIs at some indices; rows that are not valid are meaningless."""
        corners = index.unsqueeze(2).expand(-1, -1, 4)
        return SampledRois(
            self.boxes.gather(1, corners),
            self.labels.gather(1, index),
            self.deltas.gather(1, corners),
            self.box_index.gather(1, index),
            self.is_positive.gather(1, index) & is_valid,
            is_valid,
        )


class RoiHead(nn.Module):
    """A head that gives every RoI class logits, background last, and deltas for each class or for all together."""

    rois_share_statistics = False
    """whether the output for a RoI depends on the other RoIs of the group, as with batch norm"""

    def __init__(
        self,
        recipe: RoiHeadRecipe,
        num_classes: int,
        *,
        delta_weights: Weights = DELTA_WEIGHTS,
        is_class_agnostic: bool = False,
    ) -> None:
        super().__init__()
        self.recipe, self.num_classes, self.delta_weights = recipe, num_classes, delta_weights
        self.num_regressed = 1 if is_class_agnostic else num_classes

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets) -> SampledRois:
        """Add the ground truth to the proposals, match them, and sample a fixed number an image."""
        recipe = self.recipe
        boxes, is_candidate = _joined(proposals, targets)
        places = torch.arange(targets.boxes.shape[1], device=targets.boxes.device) + _FIRST_TRUTH_IDENTITY
        identities = torch.cat([proposals.identities, places.expand(len(boxes), -1)], 1)
        matches = match_boxes(
            boxes, targets.boxes, targets.is_box, recipe.positive_iou, recipe.positive_iou, keep_best=False
        )
        matches.is_positive &= is_candidate
        matches.is_negative &= is_candidate
        sample = sample_matches(
            matches, identities, targets.image_seeds, recipe.samples, recipe.positive_fraction, _PURPOSE
        )
        rois = boxes.gather(1, sample.index.unsqueeze(2).expand(-1, -1, 4))
        box_index = matches.box_index.gather(1, sample.index)
        return self._with_targets(rois, box_index, sample.is_positive, sample.is_valid, targets)

    def candidates(self, proposals: Proposals, targets: Targets) -> SampledRois:
        """All proposals followed by the ground truth, with their targets."""
        return self.match(*_joined(proposals, targets), targets)

    @torch.no_grad()
    def match(
        self, rois: Float[Tensor, "images rois 4"], is_valid: Bool[Tensor, "images rois"], targets: Targets
    ) -> SampledRois:
        """All RoIs with their targets."""
        iou = self.recipe.positive_iou
        matches = match_boxes(rois, targets.boxes, targets.is_box, iou, iou, keep_best=False)
        return self._with_targets(rois, matches.box_index, matches.is_positive & is_valid, is_valid, targets)

    def _with_targets(
        self, rois: Tensor, box_index: Tensor, is_positive: Tensor, is_valid: Tensor, targets: Targets
    ) -> SampledRois:
        if targets.boxes.shape[1] == 0:
            background = torch.full_like(box_index, self.num_classes)
            return SampledRois(rois, background, torch.zeros_like(rois), box_index, is_positive, is_valid)
        labels = targets.labels.gather(1, box_index).masked_fill(~is_positive, self.num_classes)
        matched = targets.boxes.gather(1, box_index.unsqueeze(2).expand(-1, -1, 4))
        deltas = encode_boxes(matched, rois, self.delta_weights)
        return SampledRois(rois, labels, deltas, box_index, is_positive, is_valid)

    def terms(
        self,
        logits: Float[Tensor, "images samples classes_and_background"],
        deltas: Float[Tensor, "images samples regressed 4"],
        sampled: SampledRois,
    ) -> tuple[Float[Tensor, "images samples"], Float[Tensor, "images samples"]]:
        """Class and box loss of each RoI; 0 if it is not valid, the box loss also if it is not positive."""
        classes = F.cross_entropy(logits.flatten(0, 1), sampled.labels.flatten(), reduction="none")
        classes = classes.view_as(sampled.labels) * sampled.is_valid
        own = sampled.labels.clamp(max=self.num_regressed - 1).unsqueeze(2).unsqueeze(3).expand(-1, -1, 1, 4)
        own_deltas = deltas.gather(2, own).squeeze(2)
        recipe = self.recipe
        regression = box_loss(
            recipe.box_loss, own_deltas, sampled.deltas, sampled.boxes, self.delta_weights, recipe.smooth_l1_beta
        )
        return classes, regression * sampled.is_positive

    def losses(
        self,
        logits: Float[Tensor, "images samples classes_and_background"],
        deltas: Float[Tensor, "images samples regressed 4"],
        sampled: SampledRois,
    ) -> dict[str, Float[Tensor, " images"]]:
        """Class and box loss of each image, sums over its sampled RoIs divided by their number (Eq. 1).

        `box_head_positive` is the fraction of the sampled RoIs that is positive (Table 1).
        """
        classes, regression = self.terms(logits, deltas, sampled)
        return {
            "box_head_class": mean_per_image(classes, sampled.is_valid),
            "box_head_box": mean_per_image(regression, sampled.is_valid),
            "box_head_positive": mean_per_image(sampled.is_positive.to(logits.dtype), sampled.is_valid),
        }

    @torch.no_grad()
    def detections(
        self,
        scores: Float[Tensor, "images proposals classes_and_background"],
        deltas: Float[Tensor, "images proposals regressed 4"],
        proposals: Proposals,
        sizes: Int64[Tensor, "images 2"],
    ) -> BatchDetections:
        """The best boxes of all classes after NMS within each class, given the probabilities of the classes."""
        recipe = self.recipe
        classes = self.num_classes
        scores = scores[..., :classes] * proposals.is_valid.unsqueeze(2)
        boxes = clip_boxes(decode_boxes(deltas, proposals.boxes.unsqueeze(2), self.delta_weights), sizes)
        boxes = boxes.expand(-1, -1, classes, -1)
        is_large = ((boxes[..., 2:] - boxes[..., :2]) >= SMALLEST_DETECTION).all(dim=3)
        is_candidate = (scores > recipe.score_threshold) & is_large
        image, _, label = candidates = is_candidate.nonzero(as_tuple=True)
        keep = segmented_nms(boxes[candidates], scores[candidates], image * classes + label, recipe.nms_iou)
        kept = torch.zeros_like(is_candidate)
        kept[candidates] = keep
        keys = score_keys(scores.flatten(1)).masked_fill(~kept.flatten(1), NEVER)
        best, index = top(keys, recipe.detections)
        is_found = best != NEVER
        return BatchDetections(
            boxes.flatten(1, 2).gather(1, index.unsqueeze(2).expand(-1, -1, 4)).masked_fill(~is_found.unsqueeze(2), 0),
            scores.flatten(1).gather(1, index).masked_fill(~is_found, 0),
            (index % classes).masked_fill(~is_found, -1),
        )


def _joined(
    proposals: Proposals, targets: Targets
) -> tuple[Float[Tensor, "images rois 4"], Bool[Tensor, "images rois"]]:
    """Proposals and ground truth one after another, and which of them are boxes."""
    boxes = torch.cat([proposals.boxes, targets.boxes], 1)
    return boxes, torch.cat([proposals.is_valid, targets.is_box], 1)
