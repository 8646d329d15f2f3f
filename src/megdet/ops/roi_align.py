"""RoIAlign over all levels of a pyramid as one weighted embedding bag.

The levels, channels last, are stacked into a table of rows, one row a pixel. A bin of a RoI is a weighted sum of rows:
each of its sampling points is a bilinear mix of four. Forward is one `embedding_bag` of the table;
backward sorts the taps by row (stably, so that every sum has one order) and is one `embedding_bag` of the output's
gradient. There is no loop over levels and no scatter with atomics, and both directions are deterministic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megdet.ops.constants import constant
from megdet.ops.weighted_bag import ragged_bags, weighted_bags


@dataclass
class FeatureTable:
    """A pyramid as one table of pixels, its first row all zeros.

    Row 1 + start[level] + (image * height[level] + y) * width[level] + x is pixel (y, x) of an image on a level.
    """

    rows: Float[Tensor, "rows channels"]
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    starts: tuple[int, ...]

    def take(self, index: Int64[Tensor, " taken"]) -> Float[Tensor, "taken channels"]:
        """Rows by index; the gradient is summed per row in a fixed order.

        It is added in place to the gradient of later readers, so that two tables of gradients never exist.
        """
        taken: Tensor
        taken, self.rows = _TakenRows.apply(self.rows, index)
        return taken


def feature_table(levels: Sequence[Float[Tensor, "images channels _ _"]]) -> FeatureTable:
    """Stack the levels of a pyramid; a level in channels-last memory is copied without a permutation."""
    images, channels = levels[0].shape[:2]
    rows = [level.permute(0, 2, 3, 1).reshape(-1, channels) for level in levels]
    heights, widths = tuple(level.shape[2] for level in levels), tuple(level.shape[3] for level in levels)
    starts, start = [], 1
    for height, width in zip(heights, widths, strict=True):
        starts.append(start)
        start += images * height * width
    return FeatureTable(torch.cat([rows[0].new_zeros(1, channels), *rows]), heights, widths, tuple(starts))


def roi_levels(
    rois: Float[Tensor, "rois 4"], num_levels: int, canonical_size: float, canonical_level: int = 2
) -> Int64[Tensor, " rois"]:
    """The level from which each RoI is pooled, 0 the finest (Eq. 1 of the FPN paper).

    A RoI of `canonical_size` pixels goes to `canonical_level`, one of half that size to the next finer level. A NaN
    size goes to the finest.
    """
    level = _fitting_level(rois, canonical_size, canonical_level).floor()
    return level.clamp(min=0, max=num_levels - 1).to(torch.int64)


def roi_level_pairs(
    rois: Float[Tensor, "rois 4"], num_levels: int, canonical_size: float, canonical_level: int = 2
) -> Int64[Tensor, "2 rois"]:
    """The two neighbouring levels nearest to each RoI's size, the finer first; one of them is that of `roi_levels`.

    The other is the next finer level if the RoI is in the smaller half of its level's log sizes, else the next coarser.
    """
    coarser = (_fitting_level(rois, canonical_size, canonical_level) + 0.5).floor()
    coarser = coarser.clamp(min=1, max=num_levels - 1).to(torch.int64)
    return torch.stack([coarser - 1, coarser])


def _fitting_level(rois: Tensor, canonical_size: float, canonical_level: int) -> Tensor:
    """The level for each RoI's size (Eq. 1 of the FPN paper), not rounded."""
    size = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).nan_to_num(nan=0.0).clamp(min=0).sqrt()
    return canonical_level + torch.log2(size / canonical_size) + 1e-6


def roi_align(
    table: FeatureTable,
    strides: Sequence[int],
    rois: Float[Tensor, "rois 4"],
    image_index: Int64[Tensor, " rois"],
    levels: Int64[Tensor, " rois"],
    pool_size: int,
    sampling_ratio: int,
    *,
    aligned: bool,
) -> Float[Tensor, "rois bins channels"]:
    """Pool each RoI to pool_size x pool_size bins, row by row, from its level (Mask R-CNN, Sec. 3).

    `rois` are in pixels of the image and get no gradient. The value of a bin is the mean of sampling_ratio^2 bilinear
    samples, as in `torchvision.ops.roi_align`. With a ratio of 0 there are as many along an edge as the bin spans
    pixels, rounded up; the host waits for a GPU to know that number. Points more than a pixel outside the map count as
    zero, and so do all points of a RoI with a coordinate that is not finite. `aligned` shifts by the half pixel between
    the corner and the centre of a pixel.
    """
    places = _Places(table, strides, rois.detach(), image_index, levels, aligned)
    if sampling_ratio:
        bins = weighted_bags(table.rows, *_taps(places, pool_size, sampling_ratio))
    else:
        bins = ragged_bags(table.rows, *_adaptive_taps(places, pool_size), len(rois) * pool_size**2)
    return bins.reshape(rois.shape[0], pool_size * pool_size, table.rows.shape[1])


def position_sensitive_roi_align(
    maps: Float[Tensor, "images channels_of_all_bins height width"],
    stride: int,
    rois: Float[Tensor, "rois 4"],
    image_index: Int64[Tensor, " rois"],
    pool_size: int,
    sampling_ratio: int,
) -> Float[Tensor, "rois bins channels"]:
    """Pool each RoI to pool_size x pool_size bins, each from channels of its own (R-FCN, Sec. 3).

    Channels are ordered bin after bin. Differs from the paper: a bin is the mean of bilinear samples, as in RoIAlign
    and `torchvision.ops.ps_roi_align`, not of whole pixels.
    """
    images, channels, height, width = maps.shape
    bins = pool_size * pool_size
    # a pixel has a row for each bin
    rows = maps.permute(0, 2, 3, 1).reshape(images * height * width * bins, channels // bins)
    table = FeatureTable(rows, (height,), (width,), (0,))
    level = torch.zeros_like(image_index)
    places = _Places(table, (stride,), rois.detach(), image_index, level, aligned=True)
    pixel, weights = _taps(places, pool_size, sampling_ratio)
    own_bin = torch.arange(bins, device=maps.device).repeat(len(rois)).unsqueeze(1)
    return weighted_bags(rows, pixel * bins + own_bin, weights).reshape(len(rois), bins, channels // bins)


class _Places:
    """Each RoI on its level: upper left corner and size, (rois, 2) in x and y, with the size and stride of the map."""

    def __init__(
        self,
        table: FeatureTable,
        strides: Sequence[int],
        rois: Tensor,
        image_index: Tensor,
        levels: Tensor,
        aligned: bool,
    ) -> None:
        device, work = rois.device, torch.float64 if rois.dtype == torch.float64 else torch.float32
        shape = constant((table.heights, table.widths), torch.int64, device)[:, levels]
        self.height, self.width = shape[0], shape[1]
        scale = constant(tuple(1.0 / stride for stride in strides), work, device)[levels].unsqueeze(1)
        scaled = rois.to(work) * scale - (0.5 if aligned else 0.0)
        scaled = scaled.where(rois.isfinite().all(1, keepdim=True), math.nan)  # then all its points count as outside
        self.low, self.size = scaled[:, :2], scaled[:, 2:] - scaled[:, :2]
        if not aligned:
            self.size = self.size.clamp(min=1.0)
        self.start = constant(table.starts, torch.int64, device)[levels] + image_index * self.height * self.width


def _taps(places: _Places, pool_size: int, sampling_ratio: int) -> tuple[Tensor, Tensor]:
    """Rows and weights of every bin, both (rois * bins, 4 * sampling_ratio^2)."""
    width, start, low = places.width, places.start, places.low
    count = pool_size * sampling_ratio
    steps = (torch.arange(count, device=low.device, dtype=low.dtype) + 0.5) / count
    points = low.unsqueeze(2) + places.size.unsqueeze(2) * steps
    x_low, x_high, x_weight_low, x_weight_high = _bilinear(points[:, 0], width.unsqueeze(1))
    y_low, y_high, y_weight_low, y_weight_high = _bilinear(points[:, 1], places.height.unsqueeze(1))
    y_rows = torch.stack([y_low, y_high], 2) * width.reshape(-1, 1, 1) + start.reshape(-1, 1, 1)
    taps = 2 * sampling_ratio
    shape_y, shape_x = (-1, pool_size, 1, taps, 1), (-1, 1, pool_size, 1, taps)
    index = y_rows.reshape(shape_y) + torch.stack([x_low, x_high], 2).reshape(shape_x)
    y_weights = torch.stack([y_weight_low, y_weight_high], 2).reshape(shape_y)
    x_weights = torch.stack([x_weight_low, x_weight_high], 2).reshape(shape_x)
    weights = y_weights * x_weights * (1.0 / sampling_ratio**2)
    return index.reshape(-1, taps * taps), weights.reshape(-1, taps * taps)


def _adaptive_taps(places: _Places, pool_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and weights of all samples, four a sample, and the bin of each tap; bins follow one another."""
    device, bins = places.low.device, pool_size**2
    samples = (places.size / pool_size).nan_to_num(nan=1.0).ceil().clamp(min=0).to(torch.int64)  # of a bin, x and y
    per_bin = samples.prod(1)
    bin_of = torch.repeat_interleave(torch.arange(len(per_bin) * bins, device=device), per_bin.repeat_interleave(bins))
    roi, own_bin = bin_of // bins, bin_of % bins
    first = (per_bin.cumsum(0) - per_bin)[roi] * bins + own_bin * per_bin[roi]
    place = torch.arange(len(bin_of), device=device) - first
    across = samples[roi]
    step = torch.stack([place % across[:, 0], place // across[:, 0]], 1)
    own = torch.stack([own_bin % pool_size, own_bin // pool_size], 1)
    low, size = places.low[roi], places.size[roi]
    points = low + size * ((own + (step.to(low.dtype) + 0.5) / across) / pool_size)
    x_low, x_high, *x_weights = _bilinear(points[:, 0], places.width[roi])
    y_low, y_high, *y_weights = _bilinear(points[:, 1], places.height[roi])
    rows = torch.stack([y_low, y_low, y_high, y_high], 1) * places.width[roi].unsqueeze(1)
    index = rows + torch.stack([x_low, x_high, x_low, x_high], 1) + places.start[roi].unsqueeze(1)
    weights = torch.stack([y * x for y in y_weights for x in x_weights], 1) / per_bin[roi].unsqueeze(1)
    return index.flatten(), weights.flatten(), bin_of.repeat_interleave(4)


def _bilinear(points: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lower and upper pixel along one axis and their weights; both weights are 0 outside the map."""
    is_inside = (points >= -1.0) & (points <= length)
    points = torch.where(is_inside, points, 0.0).clamp(min=0)  # points outside may be NaN
    low = torch.minimum(points.floor().to(torch.int64), length - 1)
    high = torch.minimum(low + 1, length - 1)
    fraction = (points - low).clamp(max=1.0) * (high > low)
    inside = is_inside.to(points.dtype)
    return low, high, (1 - fraction) * inside, fraction * inside


class _TakenRows(torch.autograd.Function):
    """Takes some rows of a table, and passes the table on to later readers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index)
        return rows[index], rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, of_taken: Tensor, of_table: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        of_table = of_table.contiguous()
        if of_table.is_cuda:  # sorted first: adding by index has no fixed order on a GPU
            return of_table.index_put_((index,), of_taken, accumulate=True), None
        return of_table.index_add_(0, index, of_taken), None
