"""A second detector, which no file of the package knows: one look at the anchors of a pyramid, a score for each class.

Importing this adds it to the choice, here and in the processes of ranks; `forget` takes it away again.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.architecture import MODELS, Model
from megdet.architecture_parts import Anchors as AnchorsRecipe
from megdet.architecture_parts import Fpn as FpnRecipe
from megdet.bounds import AtLeastOne, Fraction
from megdet.layers.convert import norm_factory
from megdet.model import choice
from megdet.model.anchors import AnchorGrid
from megdet.model.detector import Count, Detector, Samples
from megdet.model.fpn import Fpn
from megdet.ops.boxes import clip_boxes, decode_boxes, encode_boxes
from megdet.ops.losses import mean_per_image, smooth_l1
from megdet.ops.matching import match_boxes, sample_matches
from megdet.ops.nms import segmented_nms
from megdet.ops.ordering import NEVER, score_keys, top
from megdet.structures import BatchDetections, Targets

WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class SingleStageRecipe(Model):
    """A detector of one stage."""

    kind: Literal["single_stage"] = "single_stage"
    """which detector it is"""
    fpn: FpnRecipe = field(default_factory=lambda: FpnRecipe(channels=16))
    anchors: AnchorsRecipe = field(default_factory=lambda: AnchorsRecipe(sizes=(8.0, 16.0, 32.0, 48.0, 64.0)))
    samples: AtLeastOne = 32
    """anchors an image in the loss"""
    positive_iou: Fraction = 0.5
    """an anchor of at least this overlap with a box is positive"""
    detections: AtLeastOne = 10
    """detections an image"""


class SingleStage(Detector):
    loss_names = ("class_loss", "box_loss")
    counts = (Count("positive", "anchor", "samples"),)
    parts: ClassVar = {"backbone": "backbone", "fpn": "FPN", "classes": "classes", "deltas": "boxes"}
    dense_parts = ("backbone", "fpn")
    class_layers = ("classes",)
    small_start: ClassVar = {"classes": 10.0, "deltas": 10.0}
    same_meaning = ("backbone.name", "anchors.sizes")
    sampling_keys = ("samples", "positive_iou")

    def __init__(self, architecture, num_classes, lane, recompute_plan="none"):
        super().__init__(architecture, num_classes, lane, recompute_plan)
        channels, norm = architecture.fpn.channels, architecture.fpn.norm
        self.fpn = Fpn(self.backbone.channels, channels, norm_factory(norm, lane), has_norm=norm != "none")
        self.anchors = AnchorGrid(architecture.anchors)
        self.classes = nn.Conv2d(channels, self.anchors.per_cell * num_classes, 1)
        self.deltas = nn.Conv2d(channels, self.anchors.per_cell * 4, 1)
        for layer in (self.classes, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def features(self, images):
        return self.recompute(self.dense_part("fpn"), self.dense_part("backbone")(images))

    def look(self, images) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors (anchors, 4), logits (images, anchors, classes) and deltas (images, anchors, 4)."""
        pyramid = self.features(images)
        grids = [tuple(level.shape[2:]) for level in pyramid]
        anchors = torch.cat(self.anchors(tuple(images.shape[2:]), grids, images.dtype, images.device))
        outputs = [(self.classes(level), self.deltas(level)) for level in pyramid]
        logits, deltas = (
            torch.cat([o.permute(0, 2, 3, 1).flatten(1) for o in own], 1) for own in zip(*outputs, strict=True)
        )
        shape = len(images), len(anchors)
        return anchors, logits.to(anchors.dtype).reshape(*shape, -1), deltas.to(anchors.dtype).reshape(*shape, 4)

    def sampled(self, anchors, targets: Targets):
        iou = self.architecture.positive_iou
        matches = match_boxes(anchors.unsqueeze(0), targets.boxes, targets.is_box, iou, iou, keep_best=True)
        names = torch.arange(len(anchors), device=anchors.device).unsqueeze(0)
        return matches, sample_matches(matches, names, targets.image_seeds, self.architecture.samples, 0.5)

    def losses(self, images, sizes, targets):  # noqa: ARG002  # every detector is called so
        boxes = F.pad(targets.boxes.to(images.dtype), (0, 0, 0, 1))  # an image without boxes has one to gather
        anchors, logits, deltas = self.look(images)
        matches, sample = self.sampled(anchors, targets)
        corners = sample.index.unsqueeze(2).expand(-1, -1, 4)
        box = matches.box_index.gather(1, sample.index)
        wanted = encode_boxes(boxes.gather(1, box.unsqueeze(2).expand(-1, -1, 4)), anchors[sample.index], WEIGHTS)
        labels = F.pad(targets.labels, (0, 1), value=-1).gather(1, box).masked_fill(~sample.is_positive, -1)
        is_class = labels.unsqueeze(2) == torch.arange(self.num_classes, device=labels.device)
        own = logits.gather(1, sample.index.unsqueeze(2).expand(-1, -1, self.num_classes))
        classes = F.binary_cross_entropy_with_logits(own, is_class.to(own.dtype), reduction="none").sum(2)
        regression = smooth_l1(deltas.gather(1, corners), wanted, 1 / 9).sum(2) * sample.is_positive
        return {
            "class_loss": mean_per_image(classes * sample.is_valid, sample.is_valid),
            "box_loss": mean_per_image(regression, sample.is_valid),
            "positive": sample.is_positive.sum(1).to(own.dtype),
        }

    @torch.no_grad()
    def samples(self, images, sizes, targets):  # noqa: ARG002  # every detector is called so
        anchors = self.look(images)[0]
        _, sample = self.sampled(anchors, targets)
        return Samples(anchors[sample.index], sample.is_positive, sample.is_valid)

    @torch.no_grad()
    def detect(self, images, sizes):
        anchors, logits, deltas = self.look(images)
        keys, index = top(score_keys(logits.flatten(1)), 10 * self.architecture.detections)
        anchor, label = index // self.num_classes, index % self.num_classes
        moved = decode_boxes(deltas.gather(1, anchor.unsqueeze(2).expand(-1, -1, 4)), anchors[anchor], WEIGHTS)
        boxes, scores = clip_boxes(moved, sizes), logits.sigmoid().flatten(1).gather(1, index)
        image = torch.arange(len(images), device=images.device).unsqueeze(1)
        segments = image * self.num_classes + label
        keep = segmented_nms(boxes.flatten(0, 1), scores.flatten(), segments.flatten(), 0.5).view_as(keys)
        best, place = top(keys.masked_fill(~keep, NEVER), self.architecture.detections)
        is_found = best != NEVER
        return BatchDetections(
            boxes.gather(1, place.unsqueeze(2).expand(-1, -1, 4)).masked_fill(~is_found.unsqueeze(2), 0),
            scores.gather(1, place).masked_fill(~is_found, 0),
            label.gather(1, place).masked_fill(~is_found, -1),
        )


MODELS["single_stage"] = SingleStageRecipe
choice.DETECTORS[SingleStageRecipe] = SingleStage


def forget() -> None:
    """Take it out of the choice."""
    del MODELS["single_stage"], choice.DETECTORS[SingleStageRecipe]
