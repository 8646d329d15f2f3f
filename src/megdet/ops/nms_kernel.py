"""Non-maximum suppression of many segments on a GPU in one launch, without waiting for the host (Triton).

Imported only for boxes on a GPU; `ops/nms.py` has the plain form, against which this one is tested.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megdet.ops.constants import constant

_BLOCK = 512
"""Candidates that one pass of a program compares with a better box."""


def thin_segments(boxes: Tensor, scores: Tensor, segments: Tensor, iou_threshold: float) -> Tensor:
    """Which candidates survive within their own segment; the arguments are those of `segmented_nms`."""
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score[segments[by_score].argsort(stable=True)]
    sorted_segments = segments[order]
    ends = torch.searchsorted(sorted_segments, sorted_segments, right=True)
    alive = (sorted_segments >= 0).to(torch.int32)
    if len(order):
        # as a scalar argument of the kernel the threshold would be rounded to float32, and ties could differ
        threshold = constant((iou_threshold,), torch.float64, boxes.device)
        # a program for every candidate; only the first of each segment works. One stage: a load moved before the
        # barrier would read the state of the round before. No fusion: x * y + z must round twice
        _thin[(len(order),)](
            boxes[order].contiguous(),
            sorted_segments,
            ends,
            alive,
            threshold,
            BLOCK=_BLOCK,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return torch.zeros_like(alive, dtype=torch.bool).index_put((order,), alive > 0)


@triton.jit
def _thin(boxes, segments, ends, alive, threshold, BLOCK: tl.constexpr):
    start = tl.program_id(0)
    segment = tl.load(segments + start)
    before = tl.load(segments + start - 1, mask=start > 0, other=-1)
    if (segment >= 0) & (segment != before):
        end = tl.load(ends + start).to(tl.int32)
        iou_threshold = tl.load(threshold)
        for i in range(start, end):
            if tl.load(alive + i, volatile=True) != 0:
                x1 = tl.load(boxes + 4 * i)
                y1 = tl.load(boxes + 4 * i + 1)
                x2 = tl.load(boxes + 4 * i + 2)
                y2 = tl.load(boxes + 4 * i + 3)
                area = (x2 - x1) * (y2 - y1)
                for first in range(i + 1, end, BLOCK):
                    j = first + tl.arange(0, BLOCK)
                    is_candidate = j < end
                    other_x1 = tl.load(boxes + 4 * j, mask=is_candidate, other=0.0)
                    other_y1 = tl.load(boxes + 4 * j + 1, mask=is_candidate, other=0.0)
                    other_x2 = tl.load(boxes + 4 * j + 2, mask=is_candidate, other=0.0)
                    other_y2 = tl.load(boxes + 4 * j + 3, mask=is_candidate, other=0.0)
                    width = tl.maximum(tl.minimum(x2, other_x2) - tl.maximum(x1, other_x1), 0.0)
                    height = tl.maximum(tl.minimum(y2, other_y2) - tl.maximum(y1, other_y1), 0.0)
                    both = width * height
                    other_area = (other_x2 - other_x1) * (other_y2 - other_y1)
                    # a division rounded as on a CPU, so that ties are decided as in the plain form
                    union = area + other_area - both
                    if both.dtype == tl.float32:
                        overlap = tl.div_rn(both, union)
                    else:
                        overlap = both / union
                    tl.store(alive + j, 0, mask=is_candidate & (overlap.to(tl.float64) > iou_threshold))
            tl.debug_barrier()  # the next round must read what this one suppressed
