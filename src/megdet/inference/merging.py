"""Merges several lists of detections of an image: from several looks (test-time augmentation) or several detectors."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megdet.ops.box_voting import fused_boxes, soft_nms, voted_boxes, voters
from megdet.ops.nms import segmented_nms
from megdet.recipe import MergeKind

SIGMA = 0.5
"""Sigma of Gaussian soft-NMS, its authors' choice."""


@dataclass(frozen=True)
class Candidates:
    """Detections of several members (looks or detectors), a row each, on the CPU."""

    images: Int64[Tensor, " candidates"]
    labels: Int64[Tensor, " candidates"]
    boxes: Float[Tensor, "candidates 4"]
    """x1, y1, x2, y2"""
    scores: Float[Tensor, " candidates"]
    members: Int64[Tensor, " candidates"]
    weights: Float[Tensor, "members classes"]
    """the weight of each member for each class, relative to the other members"""


@dataclass(frozen=True)
class Merged:
    """The merged detections, a row each: by image, best first."""

    index: Int64[Tensor, " rows"]
    """the candidate that stands for the object"""
    boxes: Float[Tensor, "rows 4"]
    scores: Float[Tensor, " rows"]
    row: Int64[Tensor, " votes"]
    """the row that each vote is for, in rising order"""
    voter: Int64[Tensor, " votes"]
    """the candidate that gives each vote"""
    weight: Float[Tensor, " votes"]


@dataclass(frozen=True)
class _Winners:
    """The best candidate of each object, in any order."""

    index: Tensor
    boxes: Tensor
    scores: Tensor
    voter_of: tuple[Tensor, Tensor] | None = None
    """the winner and the voter of every vote, as candidates; None = each votes for itself"""


def merge(found: Candidates, kind: MergeKind, iou: float, vote_iou: float, most: int) -> Merged:
    """Merge the candidates of each image and class into objects, at most `most` an image.

    Equal scores go to the candidate with the lower index. All kinds but wbf take the score of the best candidate, times
    its member's weight over the largest weight. wbf has the published score: the mean of a cluster's weighted scores,
    times the smaller of its size and the number of members, over the sum of the weights.

    Args:
        found: the candidates.
        kind: nms = the best candidate replaces all that overlap it; vote = the same, with the mean box of all of them;
            soft-nms and gaussian-soft-nms = overlapping candidates get lower scores; wbf = weighted boxes fusion.
        iou: candidates that overlap more are one object (not used by gaussian-soft-nms).
        vote_iou: with kind vote, candidates that overlap a winner at least so much vote.
        most: objects an image.
    """
    own_weights = found.weights[found.members, found.labels]
    segments = found.images * found.weights.shape[1] + found.labels
    weighted = found.scores * own_weights
    counts = (weighted > 0).nonzero().flatten()  # candidates without weight do not count
    candidates = found.boxes[counts], weighted[counts], segments[counts]
    scale = found.weights.amax(0)[found.labels[counts]]
    if kind == "wbf":
        won = _fused(*candidates, found.weights, found.labels[counts], iou)
    elif kind in ("soft-nms", "gaussian-soft-nms"):
        left = soft_nms(*candidates, iou, SIGMA if kind == "gaussian-soft-nms" else None)
        won = _Winners(torch.arange(len(counts)), candidates[0], left / scale)
    else:
        is_winner = segmented_nms(*candidates, iou)
        winners = is_winner.nonzero().flatten()
        boxes = voted_boxes(*candidates, vote_iou) if kind == "vote" else candidates[0]
        pairs = voters(*candidates, is_winner, vote_iou) if kind == "vote" else None
        won = _Winners(winners, boxes[winners], (candidates[1] / scale)[winners], pairs)
    return _best(won, counts, found.images, weighted, most)


def _fused(boxes: Tensor, weighted: Tensor, segments: Tensor, weights: Tensor, labels: Tensor, iou: float) -> _Winners:
    owner, fused = fused_boxes(boxes, weighted, segments, iou)
    winners = (owner == torch.arange(len(owner))).nonzero().flatten()
    sums, sizes = torch.zeros_like(weighted), torch.zeros_like(owner)
    sums.index_add_(0, owner, weighted)
    sizes.index_add_(0, owner, torch.ones_like(owner))
    size = sizes[winners]
    scores = sums[winners] / size * size.clamp(max=len(weights)) / weights.sum(0)[labels[winners]]
    return _Winners(winners, fused[winners], scores, (owner, torch.arange(len(owner))))


def _best(won: _Winners, counts: Tensor, images: Tensor, weighted: Tensor, most: int) -> Merged:
    """The best objects of each image and their votes; `counts` are the candidates that `won` indexes."""
    won_images = images[counts[won.index]]
    by_index = won.index.argsort()
    order = by_index[won.scores[by_index].argsort(descending=True, stable=True)]
    order = order[won_images[order].argsort(stable=True)]
    _, lengths = torch.unique_consecutive(won_images[order], return_counts=True)
    rank = torch.arange(len(order)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    order = order[(rank < most) & (won.scores[order] > 0)]
    index = won.index[order]
    row_of = torch.full((len(counts),), -1).scatter(0, index, torch.arange(len(index)))
    winner, voter = (won.index, won.index) if won.voter_of is None else won.voter_of
    row = row_of[winner]
    vote = (row >= 0).nonzero().flatten()
    vote = vote[voter[vote].argsort(stable=True)]
    vote = vote[row[vote].argsort(stable=True)]
    voting = counts[voter[vote]]
    return Merged(counts[index], won.boxes[order], won.scores[order], row[vote], voting, weighted[voting])
