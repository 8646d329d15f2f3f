"""The targets of the mask head: the fraction of every cell of a grid over a RoI that its object covers.

A target is RoIAlign of the object's full-size mask, as in torchvision's `project_masks_on_boxes`: the mean of bilinear
samples in each cell, as many along an edge as a cell has pixels. No full-size mask is made. The sampling is separable,
so a target is a product of three matrices: the weights of rows in each cell, the pixels in the window of the RoI, the
weights of columns. The pixels are unpacked from bits, eight at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from megdet.ops.constants import constant
from megdet.structures import Masks

PIXELS_AT_ONCE = 1 << 20
"""Pixels of windows that a CPU unpacks at a time, unless a single window has more."""
_PIXELS_AT_ONCE_ON_GPU = 1 << 26
_BITS = tuple(tuple(byte >> (7 - bit) & 1 for bit in range(8)) for byte in range(256))


@torch.no_grad()
def mask_targets(
    masks: Masks,
    box_index: Int64[Tensor, "images rois"],
    rois: Float[Tensor, "images rois 4"],
    sizes: Int64[Tensor, "images 2"],
    canvas: tuple[int, int],
    bins: int,
) -> Float[Tensor, "images rois rows columns"]:
    """The fraction of each cell of a RoI's grid that its object covers, 0 to 1; 0 if the object has no mask.

    Args:
        masks: the masks of all objects.
        box_index: the object of each RoI.
        rois: in pixels of the canvas.
        sizes: height and width of each image; masks are 0 outside it.
        canvas: height and width of the largest possible image.
        bins: cells along each edge of the grid.
    """
    images, count = box_index.shape
    found = rois.new_zeros(images * count, bins, bins)
    if masks.frames.shape[1] == 0 or masks.bits.numel() == 0 or len(found) == 0:
        return found.reshape(images, count, bins, bins)
    frames = masks.frames.gather(1, box_index.unsqueeze(2).expand(-1, -1, 5)).flatten(0, 1)
    first_byte = torch.arange(images, device=rois.device).repeat_interleave(count) * masks.bits.shape[1]
    lengths = sizes.repeat_interleave(count, 0)
    flat = rois.flatten(0, 1)
    rows = _Axis(flat[:, 1], flat[:, 3], lengths[:, 0], frames[:, 2], frames[:, 4])
    columns = _Axis(flat[:, 0], flat[:, 2], lengths[:, 1], frames[:, 1], frames[:, 3])
    first_bit = first_byte * 8 + frames[:, 0]
    with torch.autocast(rois.device.type, enabled=False):  # bfloat16 is too coarse for the weights
        for some, height, width in _chunks(rows.num_pixels, columns.num_pixels, canvas):
            own_rows, own_columns = rows.of(some), columns.of(some)
            pixels = _unpacked(masks.bits, first_bit[some], own_rows, own_columns, height, width).to(rois.dtype)
            across = pixels @ own_columns.weights(bins, pixels.shape[2]).to(rois.dtype).transpose(1, 2)
            found[some] = own_rows.weights(bins, height).to(rois.dtype) @ across
    return found.reshape(images, count, bins, bins)


@dataclass
class _Axis:
    """One axis (x or y) of RoIs and of the frames of their objects; one number a RoI, in pixels."""

    low: Float[Tensor, " rois"]
    high: Float[Tensor, " rois"]
    length: Int64[Tensor, " rois"]
    """length of the image"""
    frame: Int64[Tensor, " rois"]
    """first pixel of the frame"""
    frame_length: Int64[Tensor, " rois"]

    def of(self, some: Tensor) -> "_Axis":
        """The axis of some of the RoIs."""
        return _Axis(*(values[some] for values in vars(self).values()))

    @property
    def size(self) -> Float[Tensor, " rois"]:
        """The length of the RoIs, at least 1 pixel, as in RoIAlign without `aligned`."""
        return (self.high - self.low).clamp(min=1)

    @property
    def first(self) -> Int64[Tensor, " rois"]:
        """The first pixel of the window, which covers the pixels of the frame that samples of the RoI may read."""
        low = self.low.floor().to(torch.int64)
        return torch.maximum(torch.minimum(low, self.length - 1), self.frame)

    @property
    def num_pixels(self) -> Int64[Tensor, " rois"]:
        """The length of the window in pixels, at least 1."""
        end = (self.low + self.size).floor().to(torch.int64) + 2
        return (torch.minimum(end, self.frame + self.frame_length) - self.first).clamp(min=1)

    def weights(self, bins: int, count: int) -> Float[Tensor, "rois bins pixels"]:
        """The weights of `count` pixels of the window in each bin; the weights of all pixels of an image sum to 1.

        A sample at p gives pixel t the weight max(0, 1 - |p - t|), which is the second difference over t of
        max(0, p - t). The samples of a bin are evenly spaced, so the sum of max(0, p - t) over those beyond t is an
        arithmetic series. Samples up to a pixel outside the image are moved to its border, others have no weight.
        """
        edge = self.size / bins
        samples = edge.ceil().double().reshape(-1, 1, 1)
        low, edge, length = (values.double().reshape(-1, 1, 1) for values in (self.low, edge, self.length))
        step = edge / samples
        start = low + torch.arange(bins, device=low.device).reshape(1, -1, 1) * edge + step / 2

        def below(t: Tensor | float) -> Tensor:
            return torch.minimum(((t - start) / step).ceil().clamp(min=0), samples)

        def up_to(t: Tensor) -> Tensor:
            return torch.minimum(((t - start) / step).floor().add(1).clamp(min=0), samples)

        first, last = below(0.0), up_to(length - 1)
        at_low_border, at_high_border = first - below(-1.0), up_to(length) - last
        pixel = self.first.reshape(-1, 1, 1) + torch.arange(count, device=low.device)
        t = F.pad(pixel, (1, 1)).double()
        t[..., 0], t[..., -1] = t[..., 1] - 1, t[..., -2] + 1
        beyond = torch.minimum((last - up_to(t)).clamp(min=0), last - first)
        total = beyond * (start + step * (last - 1) - t) - step * beyond * (beyond - 1) / 2
        weights = total[..., :-2] - 2 * total[..., 1:-1] + total[..., 2:]
        weights += at_low_border * (pixel == 0) + at_high_border * (pixel == length - 1)
        return weights / samples * (pixel < (self.frame + self.frame_length).reshape(-1, 1, 1))


def _chunks(
    heights: Int64[Tensor, " rois"], widths: Int64[Tensor, " rois"], canvas: tuple[int, int]
) -> Iterator[tuple[Int64[Tensor, " some"], int, int]]:
    """RoIs whose windows are unpacked together, and the height and width of the unpacked windows.

    A CPU takes windows of about the same area together. A GPU would have to wait for their sizes, so there all windows
    are as large as the canvas.
    """
    count, device = len(heights), heights.device
    if heights.is_cuda:
        at_once = max(1, _PIXELS_AT_ONCE_ON_GPU // (canvas[0] * canvas[1]))
        for start in range(0, count, at_once):
            yield torch.arange(start, min(count, start + at_once), device=device), *canvas
        return
    order = (heights * widths).argsort(stable=True)
    ordered = list(zip(heights[order].tolist(), widths[order].tolist(), strict=True))
    start = 0
    while start < count:
        end = _end_of_chunk(ordered, start)
        tallest, widest = (max(edges) for edges in zip(*ordered[start:end], strict=True))
        yield order[start:end], tallest, widest
        start = end


def _end_of_chunk(windows: Sequence[tuple[int, int]], start: int) -> int:
    tallest, widest = windows[start]
    for end in range(start + 1, len(windows)):
        tallest, widest = max(tallest, windows[end][0]), max(widest, windows[end][1])
        if (end + 1 - start) * tallest * widest > PIXELS_AT_ONCE:
            return end
    return len(windows)


def _unpacked(
    bits: Tensor, first_bit: Tensor, rows: _Axis, columns: _Axis, height: int, width: int
) -> Float[Tensor, "rois rows columns"]:
    """The pixels of windows, in whole bytes of columns; pixels outside a frame are meaningless."""
    device = bits.device
    row = (rows.first - rows.frame).unsqueeze(1) + torch.arange(height, device=device)
    start = (
        first_bit.unsqueeze(1) + row * columns.frame_length.unsqueeze(1) + (columns.first - columns.frame).unsqueeze(1)
    )
    byte = (start >> 3).unsqueeze(2) + torch.arange((width + 7) // 8 + 1, device=device)
    read = bits.flatten()[byte.clamp(0, bits.numel() - 1)].to(torch.int32)
    shift = (start & 7).to(torch.int32).unsqueeze(2)
    aligned = ((read[..., :-1] << 8 | read[..., 1:]) >> (8 - shift)) & 255
    return F.embedding(aligned, constant(_BITS, torch.float32, device)).flatten(2)
