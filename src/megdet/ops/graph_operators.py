"""The three steps of detection that are operators in an exported graph, whose shapes must not depend on data.

Each is a custom operator with outputs of a fixed size, which `torch.export` does not trace into. `megdet.export` says
how each is written in ONNX. A program of `torch.export` needs this module to be imported.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megdet.ops import roi_align as own_roi_align
from megdet.ops.nms import segmented_nms
from megdet.ops.ordering import score_keys
from megdet.ops.ordering import top as top_keys

NOTHING = float("-inf")
"""The score of an empty row."""


@torch.library.custom_op("megdet::top", mutates_args=())
def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of the last dimension in falling order, and their indices; ties go to the lower index.

    If there are fewer, the rest has the score NOTHING and the index 0. Scores (rows, candidates) must not be NaN.
    """
    _, places = top_keys(score_keys(scores), count)
    missing = count - places.shape[-1]
    best = torch.nn.functional.pad(scores.gather(-1, places), (0, missing), value=NOTHING)
    places = torch.nn.functional.pad(places, (0, missing))
    return best, places.masked_fill(best == NOTHING, 0)


@top.register_fake
def _(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    shape = (*scores.shape[:-1], count)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("megdet::survivors", mutates_args=())
def survivors(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, most: int) -> Tensor:
    """Which boxes (segments, candidates, 4) survive NMS within their segment; at most the `most` best of each.

    Candidates whose score (segments, candidates) does not exceed the threshold are ignored. Of equal scores the lower
    index is better.
    """
    segment = torch.arange(len(scores), device=scores.device).unsqueeze(1)
    segments = segment.expand_as(scores).masked_fill(scores <= score_threshold, -1)
    keep = segmented_nms(boxes.flatten(0, 1), scores.flatten(), segments.flatten(), iou_threshold).view_as(scores)
    best, places = top(scores.masked_fill(~keep, NOTHING), min(most, scores.shape[1]))
    # several rows may be empty, all with index 0
    chosen: Tensor = places.new_zeros(keep.shape).scatter_add(1, places, (best > NOTHING).long())
    return chosen > 0


# a fake must have all parameters of its operator
@survivors.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, most: int) -> Tensor:  # noqa: ARG001
    return scores.new_empty(scores.shape, dtype=torch.bool)


@torch.library.custom_op("megdet::roi_align", mutates_args=())
def roi_align(
    levels: Sequence[Tensor],
    strides: Sequence[int],
    rois: Tensor,
    image_index: Tensor,
    level_index: Tensor,
    pool_size: int,
    sampling_ratio: int,
    aligned: bool,  # positional: an operator's schema has no keyword-only arguments here
) -> Tensor:
    """`ops.roi_align.roi_align` of maps (images, channels, height, width): (rois, bins, channels)."""
    table = own_roi_align.feature_table(levels)
    return own_roi_align.roi_align(
        table, tuple(strides), rois, image_index, level_index, pool_size, sampling_ratio, aligned=aligned
    )


@roi_align.register_fake
def _(
    levels: Sequence[Tensor],
    strides: Sequence[int],  # noqa: ARG001
    rois: Tensor,
    image_index: Tensor,  # noqa: ARG001
    level_index: Tensor,  # noqa: ARG001
    pool_size: int,
    sampling_ratio: int,  # noqa: ARG001
    aligned: bool,  # noqa: ARG001
) -> Tensor:
    return levels[0].new_empty(rois.shape[0], pool_size * pool_size, levels[0].shape[1])
