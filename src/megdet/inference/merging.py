"""One list of detections out of several: those of many looks at an image, or of many detectors."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megdet.ops.box_voting import fused_boxes, soft_nms, voted_boxes, voters
from megdet.ops.nms import segmented_nms
from megdet.recipe import MergeKind

SIGMA = 0.5
"""Of the Gaussian form of soft-NMS, its authors' choice."""


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
    """how much each member counts for each class, relative to the other members"""


@dataclass(frozen=True)
class Merged:
    """What is left, a row each: by image, the best first."""

    index: Int64[Tensor, " rows"]
    """the candidate that stands for it"""
    boxes: Float[Tensor, "rows 4"]
    scores: Float[Tensor, " rows"]
    row: Int64[Tensor, " votes"]
    """of every vote, for which row it is; rising"""
    voter: Int64[Tensor, " votes"]
    """of every vote, the candidate that gives it"""
    weight: Float[Tensor, " votes"]


@dataclass(frozen=True)
class _Winners:
    """One candidate an object, in any order."""

    index: Tensor
    boxes: Tensor
    scores: Tensor
    voter_of: tuple[Tensor, Tensor] | None = None
    """candidates: the winner and the voter of every vote; None = each for itself"""


def merge(found: Candidates, kind: MergeKind, iou: float, vote_iou: float, most: int) -> Merged:
    """The objects that the candidates of each image and class are about, the best `most` of an image.

    Equal scores go to the lower candidate. All but wbf take the score of the best candidate, times the weight of its
    member over the largest weight. wbf has the published score: the mean of a cluster's weighted scores, times the
    least of its size and the number of members, over the sum of the weights.

    Args:
        found: the candidates.
        kind: nms = the best candidate stands for all that overlap it; vote = so too, but its box is the mean of theirs;
            soft-nms and gaussian-soft-nms = overlapping ones keep a part of their scores; wbf = weighted boxes fusion.
        iou: candidates that overlap more are of one object (no bound for gaussian-soft-nms).
        vote_iou: those that overlap a winner at least so much vote, with kind vote.
        most: objects an image.
    """
    own_weights = found.weights[found.members, found.labels]
    segments = found.images * found.weights.shape[1] + found.labels
    weighted = found.scores * own_weights
    counts = (weighted > 0).nonzero().flatten()  # what has no weight is not there
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
    """The best of each image and their votes; `counts` are the candidates that `won` is about."""
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
