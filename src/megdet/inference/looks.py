"""Test-time augmentation: detections of an image at several scales and mirrored ("looks"), merged into one list."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megdet.inference.merging import Candidates, merge
from megdet.ops.boxes import box_area, mirrored_boxes
from megdet.ops.masks import resampled_masks
from megdet.recipe import Evaluation
from megdet.structures import BatchDetections

_VOTES_TOGETHER = 256
"""Masks that are resampled together, to limit memory."""


def mirrored_pixels(
    pixels: UInt8[Tensor, "images 3 height width"] | Float32[Tensor, "images 3 height width"],
    sizes: Int64[Tensor, "images 2"],
) -> UInt8[Tensor, "images 3 height width"] | Float32[Tensor, "images 3 height width"]:
    """Every image of a canvas mirrored left to right within its own size; the rest of the canvas stays."""
    x, width = torch.arange(pixels.shape[3], device=pixels.device), sizes[:, 1:]
    source = torch.where(x < width, width - 1 - x, x)
    return pixels.gather(3, source[:, None, None].expand_as(pixels)).contiguous(memory_format=torch.channels_last)


def mirrored_detections(found: BatchDetections, sizes: Int64[Tensor, "images 2"]) -> BatchDetections:
    """Detections in mirrored images, mapped back to the images."""
    is_found = (found.labels >= 0).unsqueeze(2)
    boxes = mirrored_boxes(found.boxes, sizes[:, 1:].to(found.boxes.dtype)).masked_fill(~is_found, 0)
    return replace(found, boxes=boxes, masks=None if found.masks is None else found.masks.flip(3))


def within(found: BatchDetections, sizes: tuple[float, float]) -> BatchDetections:
    """Only the detections whose square root of area, in pixels, is at least sizes[0] and below sizes[1]."""
    edge = box_area(found.boxes).clamp(min=0).sqrt()
    is_counted = (edge >= sizes[0]) & (edge < sizes[1])
    return replace(found, labels=found.labels.masked_fill(~is_counted, -1))


def together(looks: Sequence[BatchDetections], recipe: Evaluation) -> BatchDetections:
    """The detections of several looks at the same images, merged; boxes in pixels of the files, on the CPU.

    One look stays as it is.
    A mask votes if its box does: at every place of the voted box the probability is the mean over the voters' masks,
    weighted by their scores. If boxes do not vote, a detection keeps its own mask.
    Differs from detectron2, which runs the mask head again on the merged boxes at every scale and averages the masks.
    """
    if len(looks) == 1:
        return looks[0]
    boxes = torch.cat([look.boxes for look in looks], 1)
    scores = torch.cat([look.scores for look in looks], 1).double()  # float64, like the boxes
    labels = torch.cat([look.labels for look in looks], 1)
    member = torch.cat([torch.full((look.labels.shape[1],), number) for number, look in enumerate(looks)])
    image, column = (labels >= 0).nonzero(as_tuple=True)
    num_classes = 1 + int(labels.max()) if len(image) else 1
    weights = torch.ones(len(looks), num_classes, dtype=scores.dtype)
    own = image, column
    candidates = Candidates(image, labels[own], boxes[own], scores[own], member[column], weights)
    found = merge(candidates, recipe.merge, recipe.merge_iou, recipe.vote_iou, recipe.merged_detections)
    counts = image[found.index].bincount(minlength=len(labels)).tolist()

    def padded(rows: Tensor, nothing: int) -> Tensor:
        return pad_sequence(list(torch.split(rows, counts)), batch_first=True, padding_value=nothing)

    masks = None
    if looks[0].masks is not None:
        every = torch.cat([look.masks for look in looks if look.masks is not None], 1)[own]
        own_masks = torch.zeros(len(found.index), *every.shape[1:])
        total = torch.zeros(len(found.index))
        for start in range(0, len(found.row), _VOTES_TOGETHER):
            votes = slice(start, start + _VOTES_TOGETHER)
            row, voter, weight = found.row[votes], found.voter[votes], found.weight[votes].float()
            placed = resampled_masks(every[voter].float(), candidates.boxes[voter], found.boxes[row])
            own_masks.index_add_(0, row, placed * weight[:, None, None])
            total.index_add_(0, row, weight)
        masks = padded(own_masks / total[:, None, None], 0)
    return BatchDetections(
        padded(found.boxes, 0), padded(found.scores, 0), padded(candidates.labels[found.index], -1), masks
    )
