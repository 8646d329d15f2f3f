"""The arithmetic of cross-device batch norm: Algorithm 1 forward and its exact gradient.

On the wire are one collective forward (two in the two-pass form) and one backward, each of two or three numbers a
channel. The passes over the pixels are torch's own kernels: those of `nn.SyncBatchNorm` on a GPU, and on a CPU those
that were measured to be the fastest for the memory format (`bench/batch_norm.py`).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from megdet.distributed.world import Lane


class Moments(NamedTuple):
    """The statistics of a group, a number a channel, in float32 or float64."""

    mean: Tensor
    inverse_std: Tensor
    """1 / sqrt(biased variance + eps)"""
    unbiased_var: Tensor
    num_values: Tensor
    """values a channel, shape (1,)"""


class CrossDeviceNorm(torch.autograd.Function):
    """Normalise by the moments of the lane's group. Returns the output and the moments, which carry no gradient.

    Given `moments`, of a first forward, it uses them and issues no collective.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        eps: float,
        lane: Lane,
        two_pass: bool,
        moments: Moments | None,
    ) -> tuple[Tensor, ...]:
        """One collective, or two in the two-pass form, or none where the moments are given."""
        mean, inverse_std, unbiased_var, count = moments or _moments(x, mask, eps, lane, two_pass)
        y = normalize(x, weight, bias, mean, inverse_std, eps)
        if mask is not None:
            y = torch.where(mask > 0, y, _by_channel(bias, x).to(y.dtype))
        ctx.save_for_backward(x, weight, mean, inverse_std, count, *(() if mask is None else (mask,)))
        ctx.lane = lane
        ctx.mark_non_differentiable(mean, inverse_std, unbiased_var, count)
        return y, mean, inverse_std, unbiased_var, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """One collective."""
        x, weight, mean, inverse_std, count, *rest = ctx.saved_tensors
        dy = gradients[0] * rest[0].to(x.dtype) if rest else gradients[0]
        dy = dy.contiguous(memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format)
        sums, weight_gradient, bias_gradient = _gradient_sums(dy, x, weight, mean, inverse_std)
        sums = _sum_over_lane(sums, ctx.lane)
        if x.shape[0] == 0:
            dx = torch.empty_like(x)
        elif x.is_cuda:
            sum_dy, sum_dy_centered = sums.chunk(2)
            dx = torch.batch_norm_backward_elemt(
                dy, x, mean, inverse_std, weight, sum_dy, sum_dy_centered, count.to(torch.int32)
            )
        else:
            mean_dy, mean_dy_centered = (sums / count).chunk(2)
            scale = weight * inverse_std
            slope = -scale * inverse_std**2 * mean_dy_centered
            dx = _affine(x.to(mean.dtype), slope, -scale * mean_dy - slope * mean)
            dx = dx.addcmul_(dy.to(mean.dtype), _by_channel(scale, x)).to(x.dtype)
        if rest:
            dx = dx * rest[0].to(dx.dtype)
        return dx, weight_gradient, bias_gradient, None, None, None, None, None


def normalize(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float) -> Tensor:
    """(x - mean) * inverse_std * weight + bias, by channel."""
    if x.shape[0] == 0:
        return torch.empty_like(x)
    if x.is_cuda:
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)
    scale = weight * inverse_std
    return _affine(x, scale, bias - mean * scale)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The number format of statistics: float32, or float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _moments(x: Tensor, mask: Tensor | None, eps: float, lane: Lane, two_pass: bool) -> Moments:
    if x.is_cuda and mask is None and not two_pass:
        return _moments_on_gpu(x, eps, lane)
    mean, squares, count = _two_pass(x, mask, lane) if two_pass else _merged(x, mask, lane)
    return Moments(mean, (squares / count + eps).rsqrt(), squares / (count - 1).clamp(min=1), count)


def _two_pass(x: Tensor, mask: Tensor | None, lane: Lane) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 to the letter: the mean first, then the squares centred by it. One collective each."""
    x = x.to(statistics_dtype(x))
    sums = _sum_over_lane(torch.cat([(x if mask is None else x * mask).sum(_dims(x)), _count(x, mask)]), lane)
    count = sums[-1:].clamp(min=1)  # a group of padded rows alone has no value at all
    mean = sums[:-1] / count
    return mean, _sum_over_lane(_centered_squares(x, mask, mean), lane), count


def _merged(x: Tensor, mask: Tensor | None, lane: Lane) -> tuple[Tensor, Tensor, Tensor]:
    """One collective: every rank's count, mean and centred squares, merged pairwise (Chan et al., 1983)."""
    count, mean, squares = _own_statistics(x, mask)
    if lane.width == 1:
        return mean, squares, count.clamp(min=1)
    parts = _gather_over_lane(torch.cat([count, mean, squares]), lane)
    counts, means, all_squares = parts[:, :1], parts[:, 1 : 1 + len(mean)], parts[:, 1 + len(mean) :]
    count = counts.sum(0).clamp(min=1)
    mean = (counts * means).sum(0) / count
    return mean, torch.addcmul(all_squares, counts, (means - mean) ** 2).sum(0), count


def _own_statistics(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and centred squares of this rank's share."""
    dtype, channels = statistics_dtype(x), x.shape[1]
    count = _count(x, mask)
    if x.shape[0] == 0:
        return count, *x.new_zeros(2, channels, dtype=dtype)
    if mask is not None or x.is_cuda:
        x = x.to(dtype)
        mean = (x if mask is None else x * mask).sum(_dims(x)) / count.clamp(min=1)
        return count, mean, _centered_squares(x, mask, mean)
    zeros = x.new_zeros(channels, dtype=dtype)
    if _is_channels_last(x) or x.dtype not in (torch.float32, torch.float64):
        mean, biased_var = torch.batch_norm_update_stats(x, zeros, zeros.clone(), 0.0)
        return count, mean.to(dtype), biased_var.to(dtype) * count
    # four times as fast as the kernel above where channels come first; sum x (x - m) = sum (x - m)^2 + m sum (x - m)
    length = x.numel() // channels
    mean = x.sum(_dims(x)) / length
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        x, x, None, mean, zeros + 1, None, None, False, 0.0, (False, True, True)
    )
    return count, mean, products - mean * (sums - mean * length)


def _moments_on_gpu(x: Tensor, eps: float, lane: Lane) -> Moments:
    """As `nn.SyncBatchNorm` finds them, but an empty share needs no wait: the first rank of a lane has no empty one."""
    dtype, channels = statistics_dtype(x), x.shape[1]
    count = _count(x, None)
    if x.shape[0]:
        own = torch.cat([count, *torch.batch_norm_stats(x, eps)])
    else:
        own = torch.cat([count, x.new_ones(2 * channels, dtype=dtype)])
    parts = _gather_over_lane(own, lane)
    # with a momentum of 1 the running variance becomes the group's unbiased one
    ignored, unbiased_var = x.new_zeros(2, channels, dtype=dtype)
    mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
        x,
        parts[:, 1 : 1 + channels].contiguous(),
        parts[:, 1 + channels :].contiguous(),
        ignored,
        unbiased_var,
        1.0,
        eps,
        parts[:, 0].contiguous(),
    )
    return Moments(mean, inverse_std, unbiased_var, parts[:, 0].sum(0, keepdim=True))


def _gradient_sums(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of dy and of dy (x - mean) of this rank, one after the other; gradients of weight and bias."""
    if x.shape[0] == 0:
        zeros = mean.new_zeros(2 * len(mean))
        return zeros, torch.zeros_like(weight), torch.zeros_like(weight)
    if x.is_cuda:
        sum_dy, sum_dy_centered, weight_gradient, bias_gradient = torch.batch_norm_backward_reduce(
            dy, x, mean, inverse_std, weight, True, True, True
        )
        return torch.cat([sum_dy, sum_dy_centered]), weight_gradient, bias_gradient
    _, sum_dy_centered, sum_dy = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, mean, torch.ones_like(mean), None, None, False, 0.0, (False, True, True)
    )
    sum_dy, sum_dy_centered = sum_dy.to(mean.dtype), sum_dy_centered.to(mean.dtype)
    return (
        torch.cat([sum_dy, sum_dy_centered]),
        (sum_dy_centered * inverse_std).to(weight.dtype),
        sum_dy.to(weight.dtype),
    )


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift, by channel."""
    if x.dtype == scale.dtype and (x.dim() == 2 or _is_channels_last(x)):
        return torch.addcmul(_by_channel(shift, x), x, _by_channel(scale, x))
    zeros = torch.zeros_like(scale)
    return F.batch_norm(x, zeros, zeros + 1, scale, shift, False, 0.0, 0.0)


def _sum_over_lane(tensor: Tensor, lane: Lane) -> Tensor:
    if lane.width == 1:
        return tensor
    if tensor.is_cuda:
        distributed.all_reduce(tensor, group=lane.process_group)
        return tensor
    return _gather_over_lane(tensor, lane).sum(0)  # a third faster than gloo's all-reduce, and of one order


def _gather_over_lane(tensor: Tensor, lane: Lane) -> Tensor:
    """The tensors of all ranks of the lane, one a row."""
    if lane.width == 1:
        return tensor.unsqueeze(0)
    rows = tensor.new_empty(lane.width * len(tensor))
    distributed.all_gather_into_tensor(rows, tensor, group=lane.process_group)
    return rows.reshape(lane.width, -1)


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    """Values a channel, shape (1,)."""
    per_row = math.prod(x.shape[2:])
    if mask is not None:
        return mask.sum().reshape(1) * per_row
    return torch.full((1,), x.shape[0] * per_row, dtype=statistics_dtype(x), device=x.device)


def _centered_squares(x: Tensor, mask: Tensor | None, mean: Tensor) -> Tensor:
    centered = x - _by_channel(mean, x)
    return (centered if mask is None else centered * mask).square().sum(_dims(x))


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
