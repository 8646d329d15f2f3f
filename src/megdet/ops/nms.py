"""Non-maximum suppression of many independent segments at once."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchvision.ops import nms

from megdet.ops.gpu_kernels import kernels_build

_LARGE = 300
"""candidates of a segment"""


def segmented_nms(
    boxes: Float[Tensor, "candidates 4"],
    scores: Float[Tensor, " candidates"],
    segments: Int64[Tensor, " candidates"],
    iou_threshold: float,
) -> Bool[Tensor, " candidates"]:
    """Which candidates survive NMS within their own segment (an image and level, or an image and class).

    A candidate is suppressed if its IoU with a better survivor exceeds `iou_threshold`; of equal scores the lower index
    is better. Candidates of a negative segment are padding and do not survive. Segments are
    told apart by index, never by shifted coordinates: float32 boxes moved by thousands of pixels overlap differently,
    and one call over a whole batch is quadratic in its candidates. On a GPU it is one kernel launch without a wait. If
    Triton is missing, as on Windows, or cannot build, the loop below reads the lengths of the segments from the device.
    """
    if boxes.is_cuda and kernels_build(boxes.device):
        from megdet.ops.nms_kernel import thin_segments

        return thin_segments(boxes, scores, segments, iou_threshold)
    keep = torch.zeros_like(segments, dtype=torch.bool)
    order = segments.argsort(stable=True)
    numbers, counts = torch.unique_consecutive(segments[order], return_counts=True)
    boxes, scores = boxes[order], scores[order]
    own: list[slice] = []
    start = 0
    for number, count in torch.stack([numbers, counts], dim=1).tolist():
        if number >= 0:
            own.append(slice(start, start + count))
        start += count
    if own:
        kept = _survivors(boxes, scores, own, iou_threshold)
        keep[order[torch.cat(kept)]] = True
    return keep


def _survivors(boxes: Tensor, scores: Tensor, segments: Sequence[slice], iou_threshold: float) -> list[Tensor]:
    """The places of the survivors of each segment. On a CPU NMS is quadratic and uses one thread, so large ones share.

    A small segment takes less time than it takes to hand it over.
    """

    @torch.no_grad()
    def survivors(own: slice) -> Tensor:
        places: Tensor = nms(boxes[own], scores[own], iou_threshold) + own.start
        return places

    if not boxes.is_cuda and boxes.dtype in (torch.float16, torch.bfloat16):
        boxes, scores = boxes.float(), scores.float()  # as autocast does, which other threads do not have
    threads = torch.get_num_threads()
    large = sum(own.stop - own.start >= _LARGE for own in segments)
    if boxes.is_cuda or min(threads, large) < 2:
        return [survivors(own) for own in segments]
    with ThreadPoolExecutor(min(threads, large)) as pool:  # torch's operator lets other threads of Python run
        return list(pool.map(survivors, segments))
