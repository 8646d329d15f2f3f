"""Ways to merge overlapping boxes of one object: soft-NMS, box voting, weighted boxes fusion.

Boxes of different segments (an image and class) never interact. Segments of similar length are computed together. Every
choice has a total order: the higher score, then the lower index. Sums run over the boxes of a segment in that order, so
the result of a segment depends only on its own boxes, to the bit.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megdet.ops.boxes import box_iou

_MOST_PAIRS = 1 << 21
"""Pairs of boxes of the same segment that are compared together: 16 MB in float64."""


def soft_nms(
    boxes: Float[Tensor, "candidates 4"],
    scores: Float[Tensor, " candidates"],
    segments: Int64[Tensor, " candidates"],
    iou_threshold: float,
    sigma: float | None = None,
) -> Float[Tensor, " candidates"]:
    """The scores after soft-NMS: every box lowers the scores of worse boxes that overlap it (Bodla et al., 2017).

    The best box of a segment keeps its score, the others are lowered by their overlap o with it; then the same with the
    best of the rest, and so on.

    Args:
        boxes: x1, y1, x2, y2.
        scores: at least 0.
        segments: only boxes of the same segment interact.
        iou_threshold: the linear form multiplies by 1 - o if o is above it.
        sigma: if given, the Gaussian form, which multiplies by exp(-o^2 / sigma) at every overlap.
    """
    found = torch.zeros_like(scores)
    for index, is_box in _rows(scores, segments):
        overlaps = box_iou(boxes[index], boxes[index])
        if sigma is None:
            factors = torch.where(overlaps > iou_threshold, 1 - overlaps, 1.0)
        else:
            factors = (-(overlaps**2) / sigma).exp()
        left = scores[index].masked_fill(~is_box, -1.0)
        own = torch.zeros_like(left)
        for _ in range(index.shape[1]):
            best = left.argmax(1, keepdim=True)  # among equals the first, in the order of the row
            score = left.gather(1, best)
            own.scatter_(1, best, torch.maximum(score, own.gather(1, best)))  # a finished row has only -1 left
            row_factors = factors.gather(1, best.unsqueeze(2).expand(-1, -1, index.shape[1])).squeeze(1)
            left = torch.where(left >= 0, left * row_factors, left).scatter(1, best, -1.0)
        found[index[is_box]] = own[is_box]
    return found


def is_voter(
    boxes: Float[Tensor, "rows width 4"], is_box: Bool[Tensor, "rows width"], iou_threshold: float
) -> Bool[Tensor, "rows width width"]:
    """Whether the second box of a pair votes for the first; every box votes for itself."""
    overlaps = box_iou(boxes, boxes) >= iou_threshold
    overlaps |= torch.eye(boxes.shape[1], dtype=torch.bool, device=boxes.device)
    return overlaps & is_box.unsqueeze(1) & is_box.unsqueeze(2)


def voted_boxes(
    boxes: Float[Tensor, "candidates 4"],
    scores: Float[Tensor, " candidates"],
    segments: Int64[Tensor, " candidates"],
    iou_threshold: float,
) -> Float[Tensor, "candidates 4"]:
    """Each box as the mean of the boxes of its segment with at least `iou_threshold` with it, weighted by score.

    Box voting (Gidaris and Komodakis, 2015, Sec. 4), with overlaps and scores from before any suppression. A box for
    which no other votes stays as it is.
    """
    found = boxes.clone()
    for index, is_box in _rows(scores, segments):
        own = boxes[index]
        weights = is_voter(own, is_box, iou_threshold) * scores[index].clamp(min=0).unsqueeze(1)
        others = ~torch.eye(index.shape[1], dtype=torch.bool, device=boxes.device)
        is_moved = ((weights > 0) & others).any(2).unsqueeze(2)
        found[index[is_box]] = torch.where(is_moved, _weighted_mean(own, weights), own)[is_box]
    return found


def voters(
    boxes: Float[Tensor, "candidates 4"],
    scores: Float[Tensor, " candidates"],
    segments: Int64[Tensor, " candidates"],
    winners: Bool[Tensor, " candidates"],
    iou_threshold: float,
) -> tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]:
    """The winner and the voter of every vote that `voted_boxes` counts for a winner."""
    pairs = [torch.zeros((2, 0), dtype=torch.int64, device=boxes.device)]
    for index, is_box in _rows(scores, segments):
        row, winner, voter = (is_voter(boxes[index], is_box, iou_threshold) & winners[index].unsqueeze(2)).nonzero(
            as_tuple=True
        )
        pairs.append(torch.stack([index[row, winner], index[row, voter]]))
    winner, voter = torch.cat(pairs, 1)
    return winner, voter


def fused_boxes(
    boxes: Float[Tensor, "candidates 4"],
    scores: Float[Tensor, " candidates"],
    segments: Int64[Tensor, " candidates"],
    iou_threshold: float,
) -> tuple[Int64[Tensor, " candidates"], Float[Tensor, "candidates 4"]]:
    """The clusters of weighted boxes fusion (Solovyev, Wang and Gabruseva, 2021, Sec. 3).

    The boxes of a segment come in the order of their scores. Each joins the cluster whose fused box it overlaps most,
    if that is above the threshold (the older one among equals), or begins a cluster. The fused box of a cluster is the
    mean of its boxes, weighted by their scores.

    Returns:
        For each box the index of the box that began its cluster; and the fused boxes, each at that index.
    """
    owner, fused = torch.zeros_like(segments), boxes.clone()
    for index, is_box in _rows(scores, segments):
        count, width = index.shape
        own, weight = boxes[index], scores[index] * is_box
        sums, totals, means = torch.zeros_like(own), torch.zeros_like(weight), torch.zeros_like(own)
        is_cluster = torch.zeros_like(is_box)
        joined = torch.zeros_like(index)
        rows = torch.arange(count, device=boxes.device)
        for column in range(width):
            before = slice(0, max(column, 1))
            overlaps = box_iou(own[:, column : column + 1], means[:, before]).squeeze(1)
            best = overlaps.masked_fill(~is_cluster[:, before], -1.0)
            place = best.argmax(1)
            joins = (best[rows, place] > iou_threshold) & is_box[:, column]
            place = torch.where(joins, place, column)
            sums[rows, place] += own[:, column] * weight[:, column : column + 1]
            totals[rows, place] += weight[:, column]
            is_cluster[rows, place] |= is_box[:, column]
            total = totals[rows, place].unsqueeze(1)
            is_moved = (joins & (totals[rows, place] > 0)).unsqueeze(1)
            means[rows, place] = torch.where(is_moved, sums[rows, place] / total, own[:, column])
            joined[:, column] = place
        owner[index[is_box]] = index.gather(1, joined)[is_box]
        fused[index[is_box]] = means[is_box]
    return owner, fused


def _weighted_mean(
    boxes: Float[Tensor, "rows width 4"], weights: Float[Tensor, "rows width width"]
) -> Float[Tensor, "rows width 4"]:
    """For each box the mean of all boxes of its row by its weights, added up in their order."""
    total, sums = torch.zeros_like(weights[..., 0]), torch.zeros_like(boxes)
    for column in range(boxes.shape[1]):
        weight = weights[..., column]
        total = total + weight
        sums = sums + weight.unsqueeze(2) * boxes[:, column : column + 1]
    return sums / total.clamp(min=torch.finfo(total.dtype).tiny).unsqueeze(2)


def _rows(
    scores: Float[Tensor, " candidates"], segments: Int64[Tensor, " candidates"]
) -> Iterator[tuple[Int64[Tensor, "rows width"], Bool[Tensor, "rows width"]]]:
    """Indices of the boxes of some segments, a row each, best first; and which entries of a row are boxes."""
    order = scores.argsort(descending=True, stable=True)
    order = order[segments[order].argsort(stable=True)]
    _, counts = torch.unique_consecutive(segments[order], return_counts=True)
    starts = counts.cumsum(0) - counts
    counts, by_length = counts.sort(descending=True, stable=True)
    starts = starts[by_length]
    first, lengths = 0, counts.tolist()
    while first < len(lengths):
        width = lengths[first]
        last = first + max(1, _MOST_PAIRS // width**2)
        while lengths[min(last, len(lengths)) - 1] * 2 < width:  # shorter ones would mostly be padding
            last = first + (min(last, len(lengths)) - first + 1) // 2
        columns = torch.arange(width, device=scores.device)
        is_box = columns < counts[first:last].unsqueeze(1)
        places = torch.where(is_box, starts[first:last].unsqueeze(1) + columns, starts[first:last].unsqueeze(1))
        yield order[places], is_box
        first = last
