"""The arithmetic of cross-device batch norm: Algorithm 1 forward and its exact gradient.

There is one collective forward (two in the two-pass form) and one backward, each of two or three numbers a channel. The
passes over the pixels use torch's own kernels: on a GPU those of `nn.SyncBatchNorm`, on a CPU the fastest ones measured
for the memory format (`bench/batch_norm.py`); `moments.py` keeps them exact.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megdet.distributed.lane import Lane, lane_of_all
from megdet.layers.exchanges import exchanged
from megdet.layers.image_team import current_image
from megdet.layers.moments import (
    by_channel,
    centered_sums,
    channel_moments,
    count_values,
    exact_moments,
    has_channels_last,
    other_dims,
    statistics_dtype,
    wide_dtype,
)


class Moments(NamedTuple):
    """The statistics of a group, one number a channel: in float64 or float32 on a CPU, in float32 on a GPU."""

    mean: Tensor
    inverse_std: Tensor
    """1 / sqrt(biased variance + eps)"""
    unbiased_var: Tensor
    num_values: Tensor | float
    """values a channel, 0 if all rows are padded; on a GPU a tensor of shape (1,), so that nothing waits for it"""


class CrossDeviceNorm(torch.autograd.Function):
    """Normalise by the moments of the lane's group; the gradient of x depends on them too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, eps: float, lane: Lane, moments: Moments
    ) -> Tensor:
        """No collective."""
        mean, inverse_std, _, ctx.num_values = moments
        y = normalize(x, weight, bias, mean, inverse_std, eps)
        if mask is not None:
            y = torch.where(mask > 0, y, by_channel(bias, x).to(y.dtype))
        ctx.save_for_backward(x, weight, mean, inverse_std, *(() if mask is None else (mask,)))
        ctx.lane = lane
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """One collective."""
        x, weight, mean, inverse_std, *rest = ctx.saved_tensors
        dy = gradients[0] * rest[0].to(x.dtype) if rest else gradients[0]
        if dy.stride() != x.stride():
            dy = dy.movedim(1, -1).contiguous().movedim(-1, 1) if has_channels_last(x) else dy.contiguous()
        if _has_own_group(ctx.lane) and not rest and not x.is_cuda and x.shape[0]:
            found = _own_gradients(dy, x, weight, mean, inverse_std)
        else:
            found = _gradients(dy, x, weight, mean, inverse_std, ctx.num_values, ctx.lane)
        dx, weight_gradient, bias_gradient = found
        if rest:
            dx = dx * rest[0].to(dx.dtype)
        return dx, weight_gradient, bias_gradient, None, None, None, None


def normalize(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float) -> Tensor:
    """(x - mean) * inverse_std * weight + bias, by channel."""
    if x.shape[0] == 0:
        return torch.empty_like(x)
    if x.is_cuda:
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)
    scale = (weight * inverse_std).to(statistics_dtype(x))
    return _affine(x, scale, (bias - mean * scale).to(scale.dtype))


def lane_moments(x: Tensor, mask: Tensor | None, eps: float, lane: Lane, *, two_pass: bool) -> Moments:
    """The moments of the group whose share on this rank is `x`. One collective, or two in the two-pass form.

    Call it without gradients.
    """
    if x.is_cuda and mask is None and not two_pass:
        return _moments_on_gpu(x, eps, lane)
    mean, var, count = _two_pass(x, mask, lane) if two_pass else _merged(x, mask, lane)
    if isinstance(count, Tensor):
        return Moments(mean, (var + eps).rsqrt_(), var * (count / (count - 1).clamp(min=1)), count)
    return Moments(mean, (var + eps).rsqrt_(), var * (count / max(count - 1, 1.0)), count)


def _two_pass(x: Tensor, mask: Tensor | None, lane: Lane) -> tuple[Tensor, Tensor, Tensor | float]:
    """Algorithm 1 to the letter: the mean first, then the squares centred by it. One collective each."""
    x = x.to(statistics_dtype(x))
    own = (x if mask is None else x * mask).sum(other_dims(x)).to(wide_dtype(x))
    sums = _sum_over_lane(torch.cat([own, count_values(x, mask)]), lane)
    count = sums[-1:]
    divisor = count.clamp(min=1)  # a group of padded rows only has no value
    center = (sums[:-1] / divisor).to(x.dtype)
    # the centre is a rounded mean; the mean of the centred values corrects it
    off, square = (_sum_over_lane(centered_sums(x, mask, center).flatten(), lane) / divisor).chunk(2)
    return center + off, (square - off.square()).clamp(min=0), count if x.is_cuda else count.item()


def _merged(x: Tensor, mask: Tensor | None, lane: Lane) -> tuple[Tensor, Tensor, Tensor | float]:
    """One collective: every rank's count, mean and variance, merged pairwise (Chan et al., 1983)."""
    if mask is not None or x.is_cuda:
        mean, var = exact_moments(x, mask)
    elif x.shape[0]:
        mean, var = channel_moments(x)
    else:
        mean, var = x.new_zeros(2, x.shape[1], dtype=wide_dtype(x))
    if _has_own_group(lane) and mask is None and not x.is_cuda:
        return mean, var, float(x.numel() // x.shape[1])
    parts = _gather_over_lane(torch.cat([count_values(x, mask), mean, var]), lane)
    counts, means, variances = parts[:, :1], parts[:, 1 : 1 + len(mean)], parts[:, 1 + len(mean) :]
    count = counts.sum(0)
    weights = counts / count.clamp(min=1)
    mean = (weights * means).sum(0)
    off = means - mean
    return mean, (weights * torch.addcmul(variances, off, off)).sum(0), count if x.is_cuda else count.item()


def _moments_on_gpu(x: Tensor, eps: float, lane: Lane) -> Moments:
    """As in `nn.SyncBatchNorm`, but without its wait that checks for empty shares: here rank 0 of a lane has images."""
    dtype, channels = statistics_dtype(x), x.shape[1]
    count = torch.full((1,), x.numel() // channels, dtype=dtype, device=x.device)
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


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor, count: Tensor | float, lane: Lane
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; the ranks of the lane add up the sums that the gradient of x needs."""
    if x.shape[0] == 0:
        _sum_over_lane(mean.new_zeros(2 * len(mean)), lane)
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
    if x.is_cuda:
        sum_dy, sum_dy_centered, weight_gradient, bias_gradient = torch.batch_norm_backward_reduce(
            dy, x, mean, inverse_std, weight, True, True, True
        )
        sum_dy, sum_dy_centered = _sum_over_lane(torch.cat([sum_dy, sum_dy_centered]), lane).chunk(2)
        assert isinstance(count, Tensor)
        dx = torch.batch_norm_backward_elemt(
            dy, x, mean, inverse_std, weight, sum_dy, sum_dy_centered, count.clamp(min=1).to(torch.int32)
        )
        return dx, weight_gradient, bias_gradient
    dtype = statistics_dtype(x)
    center = mean.to(dtype)
    _, weight_gradient, sum_dy = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, None, None, center, inverse_std.to(dtype), True, 0.0, (False, True, True)
    )
    # sums over dy times the normalised x, corrected for the rounding of the mean to float32
    weight_gradient = torch.addcmul(weight_gradient, (center - mean) * inverse_std, sum_dy)
    assert isinstance(count, float)
    sums = _sum_over_lane(torch.cat([sum_dy, weight_gradient]).double(), lane)
    mean_dy, mean_product = (sums / max(count, 1.0)).chunk(2)
    scale = weight * inverse_std
    slope = (-scale * inverse_std * mean_product).to(dtype)
    dx = _affine(x.to(dtype), slope, (-scale * mean_dy - slope * mean).to(dtype))
    dx = dx.addcmul_(dy.to(dtype), by_channel(scale.to(dtype), x)).to(x.dtype)
    return dx, weight_gradient.to(weight.dtype), sum_dy.to(weight.dtype)


def _own_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_gradients` by one kernel, for a lane of one rank on a CPU."""
    dtype = statistics_dtype(x)
    moments = mean.to(dtype), inverse_std.to(dtype)
    dx, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight.to(dtype), None, None, *moments, True, 0.0, (True, True, True)
    )
    return dx, weight_gradient.to(weight.dtype), bias_gradient.to(weight.dtype)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift, by channel."""
    if x.dtype == scale.dtype and has_channels_last(x):
        return torch.addcmul(by_channel(shift, x), x, by_channel(scale, x))
    zeros = torch.zeros_like(scale)
    return F.batch_norm(x, zeros, zeros + 1, scale, shift, False, 0.0, 0.0)


def mean_over_lanes(mean: Tensor, var: Tensor, num_groups: int = 1) -> tuple[Tensor, Tensor]:
    """The plain mean over the groups of all processes; `num_groups` is 0 if this process has none. One collective."""
    own = torch.cat([mean, var]).to(wide_dtype(mean)) * num_groups
    total = _sum_over_lane(torch.cat([own, own.new_full((1,), num_groups)]), lane_of_all())
    means, variances = (total[:-1] / total[-1]).tensor_split(2)
    return means, variances


def _has_own_group(lane: Lane) -> bool:
    """Whether what this thread computes is a whole group."""
    return lane.width == 1 and current_image() is None


def _sum_over_lane(tensor: Tensor, lane: Lane) -> Tensor:
    if _has_own_group(lane):
        return tensor
    if tensor.is_cuda and current_image() is None:
        return exchanged(lambda: _all_reduced(tensor, lane))
    return _gather_over_lane(tensor, lane).sum(0)  # a third faster than gloo's all-reduce, in a fixed order


def _all_reduced(tensor: Tensor, lane: Lane) -> Tensor:
    distributed.all_reduce(tensor, group=lane.process_group)
    return tensor


def _gather_over_lane(tensor: Tensor, lane: Lane) -> Tensor:
    """The tensors of all ranks of the lane, one a row; where images are computed apart, of all images of the group."""
    if (image := current_image()) is not None:
        return image.gathered(tensor, lane)
    if lane.width == 1:
        return tensor.unsqueeze(0)
    return exchanged(lambda: _gathered(tensor, lane))


def _gathered(tensor: Tensor, lane: Lane) -> Tensor:
    rows = tensor.new_empty(lane.width * len(tensor))
    distributed.all_gather_into_tensor(rows, tensor, group=lane.process_group)
    return rows.reshape(lane.width, -1)
