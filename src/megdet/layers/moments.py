"""Sums over the values of each channel on a CPU, as exact as sums in float64, at the speed of float32.

torch's kernels add up a channel in one or a few float32 numbers. Over a hundred thousand values that is too inexact for
a variance within 1e-5, and useless for a channel whose mean is large compared with its deviation. So the kernels get a
view of the input with more channels, each a run of some hundred values, without a copy, and the runs are merged (Chan
et al., 1983). Channels whose mean is still too far from 0 are centred first.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

RUN = 512
"""Values that are added up one after another in float32."""
LANES = 16
"""Partial sums that torch's kernels keep side by side if the pixels of a channel are neighbours in memory."""
SHORTEST = 64
"""Fewest values in a run: shorter ones cost more than they gain."""
FAR = 4.0
"""Channels whose mean is more than so many deviations from 0 are centred first."""

_backward = torch.ops.aten.native_batch_norm_backward


class Runs(NamedTuple):
    """Views of a tensor whose dimension 1 lists runs of one channel; together they hold all values."""

    values: list[Tensor]
    orders: list[tuple[int, int, int]]
    """how the runs of each view are counted: (outer, channels, inner)"""

    @property
    def lengths(self) -> list[int]:
        """Values in a run of each view."""
        return [part.numel() // part.shape[1] for part in self.values]


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, for `x` (n, channels, ...) of any memory format, n > 0.

    The results are in float32, or in float64 if the mean needs more digits.
    """
    runs = runs_of(x)
    if runs is None:
        return exact_moments(x)
    if has_channels_last(x) or x.dtype not in (torch.float32, torch.float64):
        mean, var = _centered(runs)
    else:
        mean, var = _products(runs)
    if torch.sub(mean * mean, var, alpha=FAR**2).max().item() > 0:
        index = (mean * mean > FAR**2 * var).nonzero().flatten()
        mean, var = mean.double(), var.double()
        mean[index], var[index] = exact_moments(x.index_select(1, index))
    return mean, var


def exact_moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by centring a copy, for `x` on any device; rows with `mask` 0 do not count."""
    x = x.to(statistics_dtype(x))
    count = count_values(x, mask).clamp(min=1)
    center = ((x if mask is None else x * mask).sum(other_dims(x)) / count).to(x.dtype)
    off, square = centered_sums(x, mask, center) / count
    return center + off, (square - off.square()).clamp(min=0)


def centered_sums(x: Tensor, mask: Tensor | None, center: Tensor) -> Tensor:
    """Sums of x - center and of its square by channel, shape (2, channels); x and center are of one dtype."""
    centered = x - by_channel(center, x)
    if mask is not None:
        centered *= mask
    dims = other_dims(x)
    return torch.stack([centered.sum(dims), centered.square().sum(dims)]).to(wide_dtype(x))


def runs_of(x: Tensor) -> Runs | None:
    """All values of a tensor in runs of at most RUN values a partial sum; None if its shape allows only short runs."""
    channels = x.shape[1]
    count = x.numel() // channels
    if not has_channels_last(x):
        pixels = count // len(x)
        length = _longest_divisor(pixels, RUN * LANES)
        if not length:
            return None
        order = (len(x), channels, pixels // length)
        return Runs([x.reshape(1, math.prod(order), length)], [order])
    length = _longest_divisor(count, RUN)
    if length:
        return Runs([_rows(x, 0, count // length, length)], [(count // length, channels, 1)])
    number = -(-count // RUN)
    length, rest = divmod(count, number)
    parts = [_rows(x, 0, number, length), _rows(x, number * length, 1, rest)]
    return Runs(parts, [(number, channels, 1), (1, channels, 1)])


def _rows(x: Tensor, start: int, number: int, length: int) -> Tensor:
    """Rows of channels from `start` on, viewed as runs of `length` rows, `number` side by side."""
    width = number * x.shape[1]
    offset = x.storage_offset() + start * x.shape[1]
    return x.as_strided((1, width, length, 1), (width * length, 1, width, width), offset)


def _longest_divisor(number: int, most: int) -> int:
    """The largest divisor up to `most`; 0 if it is smaller than SHORTEST and than the number itself."""
    if number <= most:
        return number
    for parts in range(-(-number // most), number // SHORTEST + 1):
        if number % parts == 0:
            return number // parts
    return 0


def _centered(runs: Runs) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by sums of (x - m)^2, m the mean of a run."""
    found = []
    for part in runs.values:
        is_half = part.dtype not in (torch.float32, torch.float64)
        # unused running statistics, which set the dtype of the result
        kept = part.new_zeros(part.shape[1], dtype=torch.float32) if is_half else None
        found.append(torch.batch_norm_update_stats(part, kept, kept, 0.0))
    if len(found) == 1:
        return _merged(*(tensor.view(runs.orders[0]) for tensor in found[0]))
    means, variances = (torch.cat([t.view(-1, runs.orders[0][1]) for t in parts]) for parts in zip(*found, strict=True))
    lengths = [length for length, (outer, _, _) in zip(runs.lengths, runs.orders, strict=True) for _ in range(outer)]
    weights = means.new_tensor(lengths).div_(sum(lengths)).unsqueeze(1)
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean).square_())).sum(0)


def _products(runs: Runs) -> tuple[Tensor, Tensor]:
    """As `_centered`, by sum x (x - m) - m sum (x - m): four times as fast if a channel is contiguous."""
    (values,), (length,) = runs.values, runs.lengths
    total = values.sum(2).flatten().double()
    means = total / length
    center = means.to(values.dtype)
    _, products, _ = _backward(
        values, values, None, center, torch.ones_like(center), None, None, False, 0.0, (False, True, False)
    )
    # the centre is rounded; the mean of x - m corrects it
    off = means - center
    variances = torch.addcmul(products.double() / length, off, center + off, value=-1)
    return _merged(means.view(runs.orders[0]), variances.view(runs.orders[0]))


def _merged(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of runs of one length, counted as (outer, channels, inner)."""
    if means.shape[0] * means.shape[2] == 1:
        return means.flatten(), variances.flatten()
    mean = means.mean((0, 2), keepdim=True)
    off = means - mean
    return mean.flatten(), torch.addcmul(variances, off, off).mean((0, 2))


def count_values(x: Tensor, mask: Tensor | None) -> Tensor:
    """Values a channel, shape (1,)."""
    per_row = math.prod(x.shape[2:])
    if mask is not None:
        return mask.sum(dtype=wide_dtype(x)).reshape(1) * per_row
    return torch.full((1,), x.shape[0] * per_row, dtype=wide_dtype(x), device=x.device)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype for arithmetic over values: float32, or float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype for a few numbers a channel: float64 on a CPU, that of the kernels on a GPU."""
    return statistics_dtype(x) if x.is_cuda else torch.float64


def other_dims(x: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [0, *range(2, x.dim())]


def by_channel(values: Tensor, x: Tensor) -> Tensor:
    """A value for each channel, in a shape that broadcasts with x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def has_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel, or of a row of two dimensions, are neighbours in memory."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()
