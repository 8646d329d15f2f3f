"""A detector as one graph from the pixels of a canvas to detections, for `torch.export` and ONNX.

The layers are those of the trained detector. This file has the code between them in forms that a graph can hold: no
shape depends on what is found, so empty rows are computed too.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from megdet.model.anchors import AnchorGrid, laid_out
from megdet.model.cascade_rcnn import CascadeMaskRcnn, CascadeRcnn
from megdet.model.detector import Detector
from megdet.model.faster_rcnn import FasterRcnn
from megdet.model.graph_pooling import LevelMaps, pool_maps
from megdet.model.mask_rcnn import MaskRcnn
from megdet.model.proposals import Proposals
from megdet.model.retinanet import DELTA_WEIGHTS as DENSE_WEIGHTS
from megdet.model.retinanet import RetinaNet
from megdet.model.rfcn import Rfcn
from megdet.model.roi_head import SMALLEST_DETECTION, RoiHead
from megdet.model.rpn import DELTA_WEIGHTS, Rpn
from megdet.ops.boxes import clip_boxes, decode_boxes
from megdet.ops.graph_operators import NOTHING, survivors, top
from megdet.structures import BatchDetections

_LEAST = -1.0
"""A score below every probability, for rows that do not count."""


class DetectionGraph(nn.Module, ABC):
    """Pixels and sizes of the images of a canvas to boxes, scores, labels and, where there are some, masks.

    Empty rows have label -1. The detector must be in evaluation mode; it is changed and cannot be used for anything
    else afterwards.
    """

    def __init__(self, detector: Detector, anchors: AnchorGrid) -> None:
        super().__init__()
        self.detector, self.anchors = detector, anchors
        levels = range(len(anchors.recipe.level_sizes))
        self.cells = nn.ParameterList(nn.Parameter(anchors.cell(level), requires_grad=False) for level in levels)
        pool_maps(detector)
        for parameter in self.parameters():
            parameter.data = parameter.data.contiguous()

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Boxes x1, y1, x2, y2 in pixels of the canvas, (images, detections, 4), scores, labels, masks; best first."""
        images = self.detector.normalized(pixels, sizes).contiguous()  # channels-last maps treat sizes of 1 specially
        found = self.detections(images, sizes)
        outputs = (found.boxes, found.scores, found.labels)
        return outputs if found.masks is None else (*outputs, found.masks)

    @abstractmethod
    def detections(self, images: Tensor, sizes: Tensor) -> BatchDetections:
        """The detections on normalised images."""

    def anchors_of(self, maps: list[Tensor], images: Tensor) -> list[Tensor]:
        """The anchors of each level, (anchors, 4)."""
        canvas = images.shape[2], images.shape[3]
        grids = [(level.shape[2], level.shape[3]) for level in maps]
        return [
            laid_out(cell, grid, self.anchors.stride(level, canvas, grid)).to(images.dtype)
            for level, (cell, grid) in enumerate(zip(self.cells, grids, strict=True))
        ]


class _PyramidGraph(DetectionGraph):
    detector: FasterRcnn

    def detections(self, images: Tensor, sizes: Tensor) -> BatchDetections:
        model = self.detector
        pyramid = model.features(images)
        proposals = proposed(model.rpn, model.rpn(pyramid), self.anchors_of(pyramid, images), sizes)
        maps = LevelMaps.of(pyramid)
        head, look, proposals = model.last_stage(maps, proposals, sizes)
        found = found_by(head, look(proposals.boxes, proposals.is_valid), proposals, sizes)
        if isinstance(model, MaskRcnn):
            found.masks = model.mask_head.masks(maps, found)
        return found


class _RfcnGraph(DetectionGraph):
    detector: Rfcn

    def detections(self, images: Tensor, sizes: Tensor) -> BatchDetections:
        model = self.detector
        c4, *maps = model.features(images)
        proposals = proposed(model.rpn, model.rpn([c4]), self.anchors_of([c4], images), sizes)
        look = model.look_at(maps)
        return found_by(model.box_head, look(proposals.boxes, proposals.is_valid), proposals, sizes)


class _RetinaNetGraph(DetectionGraph):
    detector: RetinaNet

    def detections(self, images: Tensor, sizes: Tensor) -> BatchDetections:
        model, head = self.detector, self.detector.head
        pyramid = model.features(images)
        anchors = self.anchors_of(pyramid, images)
        boxes, scores, labels = [], [], []
        for logits, deltas, own in zip(model.class_tower(pyramid), model.delta_tower(pyramid), anchors, strict=True):
            best, place = top(logits.flatten(1), head.candidates)
            anchor = torch.div(place, model.num_classes, rounding_mode="floor")
            own_deltas = _at(deltas, anchor)
            boxes.append(clip_boxes(decode_boxes(own_deltas, own[anchor], DENSE_WEIGHTS), sizes))
            scores.append(best.sigmoid())
            labels.append(place % model.num_classes)
        every, score, label = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(labels, 1)
        score = score.masked_fill(~every.isfinite().all(2), _LEAST)
        classes = torch.arange(model.num_classes, device=label.device).reshape(1, -1, 1)
        by_class = torch.where(label.unsqueeze(1) == classes, score.unsqueeze(1), _LEAST)
        segments = every.unsqueeze(1).expand(-1, model.num_classes, -1, -1)
        keep = survivors(
            segments.flatten(0, 1), by_class.flatten(0, 1), head.nms_iou, head.score_threshold, head.detections
        )
        is_kept = torch.unflatten(keep, 0, (-1, model.num_classes)).any(1)
        best, place = top(score.masked_fill(~is_kept, NOTHING), head.detections)
        return _padded(_at(every, place), best, label.gather(1, place))


_GRAPHS: dict[type[Detector], type[DetectionGraph]] = {
    FasterRcnn: _PyramidGraph,
    MaskRcnn: _PyramidGraph,
    CascadeRcnn: _PyramidGraph,
    CascadeMaskRcnn: _PyramidGraph,
    RetinaNet: _RetinaNetGraph,
    Rfcn: _RfcnGraph,
}


def detection_graph(detector: Any) -> DetectionGraph:
    """The graph of a detector, made of the detector's own layers."""
    return _GRAPHS[type(detector)](detector, detector.anchors).eval()


def proposed(rpn: Rpn, predicted: tuple[list[Tensor], list[Tensor]], anchors: list[Tensor], sizes: Tensor) -> Proposals:
    """`Rpn.propose` for logits and deltas that the RPN predicted."""
    recipe = rpn.recipe
    boxes, scores = [], []
    for logits, deltas, own in zip(*predicted, anchors, strict=True):
        best, place = top(logits, recipe.test_proposals_before_nms)
        moved = clip_boxes(decode_boxes(_at(deltas, place), own[place], DELTA_WEIGHTS), sizes)
        is_valid = ((moved[..., 2:] - moved[..., :2]) >= recipe.min_size).all(dim=2)
        best = best.masked_fill(~is_valid, NOTHING)
        keep = survivors(moved, best, recipe.nms_iou, NOTHING, recipe.test_proposals)
        boxes.append(moved)
        scores.append(best.masked_fill(~keep, NOTHING))
    best, place = top(torch.cat(scores, 1), recipe.test_proposals)
    is_kept = best > NOTHING
    kept = _at(torch.cat(boxes, 1), place).masked_fill(~is_kept.unsqueeze(2), 0)
    return Proposals(kept, place, is_kept)


def found_by(head: RoiHead, seen: tuple[Tensor, Tensor], proposals: Proposals, sizes: Tensor) -> BatchDetections:
    """`RoiHead.detections` for the class probabilities and deltas that the head gave the proposals."""
    recipe, classes = head.recipe, head.num_classes
    scores, deltas = seen[0][..., :classes], seen[1]
    boxes = clip_boxes(decode_boxes(deltas, proposals.boxes.unsqueeze(2), head.delta_weights), sizes)
    boxes = boxes.expand(-1, -1, classes, -1)
    is_large = ((boxes[..., 2:] - boxes[..., :2]) >= SMALLEST_DETECTION).all(dim=3)
    scores = scores.masked_fill(~(is_large & proposals.is_valid.unsqueeze(2)), _LEAST)
    keep = survivors(
        boxes.transpose(1, 2).flatten(0, 1),
        scores.transpose(1, 2).flatten(0, 1),
        recipe.nms_iou,
        recipe.score_threshold,
        recipe.detections,
    )
    is_kept = torch.unflatten(keep, 0, (-1, classes)).transpose(1, 2)
    best, place = top(scores.masked_fill(~is_kept, NOTHING).flatten(1), recipe.detections)
    return _padded(_at(boxes.flatten(1, 2), place), best, place % classes)


def _at(rows: Tensor, place: Tensor) -> Tensor:
    """The rows (images, rows, 4) at the indices (images, chosen)."""
    return rows.gather(1, place.unsqueeze(2).expand(-1, -1, 4))


def _padded(boxes: Tensor, scores: Tensor, labels: Tensor) -> BatchDetections:
    is_found = scores > NOTHING
    return BatchDetections(
        boxes.masked_fill(~is_found.unsqueeze(2), 0),
        scores.masked_fill(~is_found, 0),
        labels.masked_fill(~is_found, -1),
    )
