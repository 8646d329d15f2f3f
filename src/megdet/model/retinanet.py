"""RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", 2017): one stage, on every anchor of a pyramid."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.architecture import RetinaNet as RetinaNetRecipe
from megdet.distributed.lane import SINGLE_LANE, Lane
from megdet.layers.convert import norm_factory
from megdet.model.anchors import AnchorGrid
from megdet.model.dense_head import Tower
from megdet.model.detector import BACKBONE_MEANING, Count, Detector, Samples
from megdet.model.fpn import Fpn
from megdet.ops.boxes import clip_boxes, decode_boxes, encode_boxes
from megdet.ops.focal_loss import focal_loss
from megdet.ops.losses import box_loss, mean_per_image
from megdet.ops.matching import Matches, match_boxes
from megdet.ops.nms import segmented_nms
from megdet.ops.ordering import NEVER, score_keys, top
from megdet.recipe import RecomputePlan
from megdet.structures import BatchDetections, Targets

DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
SAMPLES_SHOWN = 256
"""Anchors an image in `samples`; the loss uses all anchors."""


@dataclass
class Predicted:
    """The head's outputs for every anchor, level by level."""

    logits: list[Float[Tensor, "images _ classes"]]
    deltas: list[Float[Tensor, "images _ 4"]]
    anchors: list[Float[Tensor, "_ 4"]]


class RetinaNet(Detector):
    """A score for each class and a better box at every anchor.

    The losses of an image are divided by the number of its own positive anchors (Sec. 4), then averaged over the
    images, as in torchvision. Detectron2 divides by the positive anchors of all images of a device: another gradient.
    """

    loss_names = ("class_focal", "anchor_box")
    counts = (Count("anchor_positive", "anchor"),)
    parts: Mapping[str, str] = {
        "backbone": "backbone",
        "fpn": "FPN",
        "class_tower": "class tower",
        "delta_tower": "box tower",
    }
    dense_parts = ("backbone", "fpn", "class_tower", "delta_tower")
    class_layers = ("class_tower.predict",)
    small_start: Mapping[str, float] = {"class_tower.predict": 10, "delta_tower.predict": 10}
    same_meaning = (
        *(*BACKBONE_MEANING, "fpn.p6_from"),
        *("anchors.sizes", "anchors.scales_per_octave", "anchors.whole_sizes", "anchors.ratios"),
        "anchors.stride_from_grid",
        "anchors.whole_pixels",
    )
    sampling_keys = (
        *("anchors.sizes", "anchors.scales_per_octave", "anchors.whole_sizes", "anchors.ratios"),
        *("anchors.stride_from_grid", "anchors.whole_pixels", "head.positive_iou", "head.negative_iou"),
    )

    def __init__(
        self,
        architecture: RetinaNetRecipe,
        num_classes: int,
        lane: Lane | None = SINGLE_LANE,
        recompute_plan: RecomputePlan = "none",
    ) -> None:
        super().__init__(architecture, num_classes, lane, recompute_plan)
        self.head = architecture.head
        fpn, head = architecture.fpn, architecture.head
        self.fpn = Fpn(
            self.backbone.channels[1:],
            fpn.channels,
            norm_factory(fpn.norm, lane),
            has_norm=fpn.norm != "none",
            p6_from=fpn.p6_from,
            large_kernel=fpn.large_kernel,
        )
        *_, last = strides = self.backbone.strides[1:]
        self.anchors = AnchorGrid(architecture.anchors, (*strides, 2 * last, 4 * last))
        norm = norm_factory(head.norm, lane)
        self.class_tower, self.delta_tower = (
            Tower(fpn.channels, head.convolutions, self.anchors.per_cell, outputs, norm, has_norm=head.norm != "none")
            for outputs in (num_classes, 4)
        )
        bias = self.class_tower.predict.bias
        assert bias is not None
        nn.init.constant_(bias, -math.log((1 - head.prior) / head.prior))

    def features(self, images: Float[Tensor, "images 3 height width"]) -> list[Float[Tensor, "images channels _ _"]]:
        """The pyramid of normalised images, P3 to P7."""
        backbone, fpn = self.dense_part("backbone"), self.dense_part("fpn")
        pyramid: list[Tensor] = self.recompute(fpn, backbone(images))
        return pyramid

    def predict(self, images: Float[Tensor, "images 3 height width"]) -> Predicted:
        """Logits, deltas and anchors of normalised images."""
        pyramid = self.features(images)
        logits = self.recompute(self.dense_part("class_tower"), pyramid)
        deltas = self.recompute(self.dense_part("delta_tower"), pyramid)
        grids = [(level.shape[2], level.shape[3]) for level in pyramid]
        canvas = (images.shape[2], images.shape[3])
        return Predicted(logits, deltas, self.anchors(canvas, grids, images.dtype, images.device))

    def match(self, anchors: Float[Tensor, "anchors 4"], targets: Targets) -> Matches:
        """The target box of every anchor, and whether the anchor is positive, negative or neither (Sec. 4)."""
        head = self.head
        return match_boxes(
            anchors.unsqueeze(0),
            targets.boxes.to(anchors.dtype),
            targets.is_box,
            head.positive_iou,
            head.negative_iou,
            keep_best=True,
        )

    def losses(
        self,
        images: Float[Tensor, "images 3 height width"],
        sizes: Int64[Tensor, "images 2"],  # noqa: ARG002  # every detector is called so
        targets: Targets,
    ) -> dict[str, Float[Tensor, " images"]]:
        """The losses and counts of normalised images, sums over an image's anchors divided by its positive ones."""
        found = self.predict(images)
        anchors = torch.cat(found.anchors)
        matches = self.match(anchors, targets)
        is_positive = matches.is_positive
        # an image without boxes still needs a row to gather
        boxes = F.pad(targets.boxes.to(anchors.dtype), (0, 0, 0, 1))
        labels = F.pad(targets.labels, (0, 1), value=-1).gather(1, matches.box_index).masked_fill(~is_positive, -1)
        is_counted = is_positive | matches.is_negative
        focal = focal_loss(torch.cat(found.logits, 1), labels, is_counted, self.head.focal_alpha, self.head.focal_gamma)
        number = is_positive.sum(1)
        return {
            "class_focal": focal.to(anchors.dtype) / number.clamp(min=1),
            "anchor_box": mean_per_image(self._box_terms(found.deltas, anchors, boxes, matches), is_positive),
            "anchor_positive": number.to(anchors.dtype) / is_counted.sum(1).clamp(min=1),
        }

    def _box_terms(
        self,
        deltas: list[Float[Tensor, "images _ 4"]],
        anchors: Float[Tensor, "anchors 4"],
        boxes: Float[Tensor, "images boxes 4"],
        matches: Matches,
    ) -> Float[Tensor, "images anchors"]:
        """The box loss of every positive anchor, 0 at the others."""
        matched = boxes.gather(1, matches.box_index.unsqueeze(2).expand(-1, -1, 4))
        references = anchors.expand_as(matched)
        wanted = encode_boxes(matched, references, DELTA_WEIGHTS)
        own = torch.cat(deltas, 1).to(wanted.dtype)
        terms = box_loss(self.head.box_loss, own, wanted, references, DELTA_WEIGHTS, self.head.smooth_l1_beta)
        return terms * matches.is_positive

    @torch.no_grad()
    def samples(
        self,
        images: Float[Tensor, "images 3 height width"],
        sizes: Int64[Tensor, "images 2"],  # noqa: ARG002  # every detector is called so
        targets: Targets,
    ) -> Samples:
        """The positive anchors of normalised images, then the negative ones with the highest scores."""
        found = self.predict(images)
        anchors = torch.cat(found.anchors)
        matches = self.match(anchors, targets)
        score = torch.cat(found.logits, 1).float().amax(2)
        # positive anchors come before all others, whatever their scores
        keys = score_keys(score.sigmoid() + 2 * matches.is_positive)
        best, index = top(keys.masked_fill(~(matches.is_positive | matches.is_negative), NEVER), SAMPLES_SHOWN)
        return Samples(anchors[index], matches.is_positive.gather(1, index), best != NEVER)

    @torch.no_grad()
    def detect(
        self, images: Float[Tensor, "images 3 height width"], sizes: Int64[Tensor, "images 2"]
    ) -> BatchDetections:
        """The detections on normalised images: the best pairs of each level, decoded, after NMS within each class."""
        head, classes = self.head, self.num_classes
        found = self.predict(images)
        boxes, scores, labels = [], [], []
        for logits, deltas, anchors in zip(found.logits, found.deltas, found.anchors, strict=True):
            own_logits, anchor, label = best_pairs(logits, head.candidates)
            own_deltas = deltas.to(anchors.dtype).gather(1, anchor.unsqueeze(2).expand(-1, -1, 4))
            boxes.append(clip_boxes(decode_boxes(own_deltas, anchors[anchor], DELTA_WEIGHTS), sizes))
            scores.append(own_logits.to(anchors.dtype).sigmoid())
            labels.append(label)
        all_boxes, all_scores, all_labels = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(labels, 1)
        is_candidate = (all_scores > head.score_threshold) & all_boxes.isfinite().all(2)
        image = torch.arange(len(sizes), device=sizes.device).unsqueeze(1)
        segments = (image * classes + all_labels).masked_fill(~is_candidate, -1)
        keep = _thinned(all_boxes, all_scores, segments, head.nms_iou)
        keys, index = top(score_keys(all_scores).masked_fill(~keep, NEVER), head.detections)
        is_found = keys != NEVER
        return BatchDetections(
            all_boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4)).masked_fill(~is_found.unsqueeze(2), 0),
            all_scores.gather(1, index).masked_fill(~is_found, 0),
            all_labels.gather(1, index).masked_fill(~is_found, -1),
        )


def best_pairs(
    logits: Float[Tensor, "images anchors classes"], count: int
) -> tuple[Float[Tensor, "images pairs"], Int64[Tensor, "images pairs"], Int64[Tensor, "images pairs"]]:
    """Logits, anchors and classes of the pairs with the highest scores, `count` an image or as many as there are.

    They are all at the `count` anchors whose best class scores highest, so only the pairs of these are sorted.
    """
    _, anchor = top(score_keys(logits.amax(2)), count)
    anchor = anchor.sort(1).values  # ties go to the lower anchor
    classes = logits.shape[2]
    own = logits.gather(1, anchor.unsqueeze(2).expand(-1, -1, classes)).flatten(1)
    _, place = top(score_keys(own), count)
    owner = anchor.gather(1, torch.div(place, classes, rounding_mode="floor"))
    return own.gather(1, place), owner, place % classes


def _thinned(
    boxes: Float[Tensor, "images candidates 4"],
    scores: Float[Tensor, "images candidates"],
    segments: Int64[Tensor, "images candidates"],
    iou: float,
) -> Bool[Tensor, "images candidates"]:
    return segmented_nms(boxes.flatten(0, 1), scores.flatten(), segments.flatten(), iou).view_as(segments)
