"""Cross-device batch normalisation (Sec. 3.3, Figure 3, Algorithm 1) and its frozen form.

A group of `bn_size` images shares one mean and one variance, however many devices carry it. The layer is told its lane
(the ranks that carry a group together) and needs to know nothing else. In a lane of one it is torch's own batch norm.

Running statistics change once a step: a step's forwards only add up the groups' means and unbiased variances, and
`finish_step` folds their plain mean over all groups of the mini-batch into the running ones.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from megdet.distributed.world import SINGLE_LANE, Lane, World
from megdet.errors import InputError

RUNNING_MOMENTUM = 0.1


class CrossDeviceBatchNorm(nn.Module):
    """Batch norm over the group that a lane carries; its state dict is that of `nn.BatchNorm2d`.

    In training the input is this rank's share of the group, `(n, channels, ...)` with n >= 0; every rank of the lane
    must call the layer in the same order, once a group. Statistics are weighted by the number of values of each share
    and kept in float32 (float64 for float64 input) whatever the precision of the input. In evaluation the running ones
    are used.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    step_mean: Tensor
    step_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, *, lane: Lane = SINGLE_LANE, two_pass: bool = False) -> None:
        super().__init__()
        self.channels, self.eps, self.lane, self.two_pass = channels, eps, lane, two_pass
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.register_buffer("step_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("step_var", torch.zeros(channels), persistent=False)

    def forward(
        self, x: Float[Tensor, "n channels *rest"], is_valid: Bool[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n channels *rest"]:
        """Normalise; rows where `is_valid` is false enter no statistic and come out as if they were the mean.

        Raises InputError when a group that one device carries has one value a channel, which has no variance.
        """
        has_no_group = self.lane.width == 1 and x.shape[0] == 0  # nothing to normalise, nothing to remember
        if not self.training or has_no_group:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if self.lane.width == 1 and is_valid is None:
            return self._local(x)
        mask = None
        if is_valid is not None:
            mask = is_valid.reshape(-1, *[1] * (x.dim() - 1)).to(_statistics_dtype(x))
        y, mean, var = _CrossDeviceNorm.apply(x, self.weight, self.bias, mask, self.eps, self.lane, self.two_pass)
        self._remember(mean, var)
        return y  # type: ignore[no-any-return]

    def _local(self, x: Tensor) -> Tensor:
        if x.numel() // self.channels < 2:
            raise InputError(
                f"batch norm of {self.channels} channels over a group with one value each (feature map "
                f"{tuple(x.shape)}) has no variance: use a larger bn_size or larger images"
            )
        # running statistics of momentum 1 are the batch's own: its mean and its unbiased variance
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        self._remember(mean, var)
        return y

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor) -> None:
        self.step_mean += mean
        self.step_var += var

    def extra_repr(self) -> str:
        """Size, eps and lane, for print()."""
        return f"{self.channels}, eps={self.eps}, lane_width={self.lane.width}"


class BatchNormAct(CrossDeviceBatchNorm):
    """Cross-device batch norm followed by an activation, for timm's fused `BatchNormAct2d`."""

    def __init__(self, channels: int, eps: float, act: nn.Module, drop: nn.Module, *, lane: Lane = SINGLE_LANE) -> None:
        super().__init__(channels, eps, lane=lane)
        self.act, self.drop = act, drop

    def forward(
        self, x: Float[Tensor, "n channels *rest"], is_valid: Bool[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n channels *rest"]:
        """Normalise, drop if the model asks for it, and activate."""
        return self.act(self.drop(super().forward(x, is_valid)))  # type: ignore[no-any-return]


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics and fixed weight and bias: BN size 0 (the usual fine-tuning)."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Float[Tensor, "n channels *rest"]) -> Float[Tensor, "n channels *rest"]:
        """Scale and shift every channel."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Size and eps, for print()."""
        return f"{self.channels}, eps={self.eps}"


class FrozenBatchNormAct(FrozenBatchNorm):
    """Frozen batch norm followed by an activation, for timm's fused `BatchNormAct2d`."""

    def __init__(self, channels: int, eps: float, act: nn.Module, drop: nn.Module) -> None:
        super().__init__(channels, eps)
        self.act, self.drop = act, drop

    def forward(self, x: Float[Tensor, "n channels *rest"]) -> Float[Tensor, "n channels *rest"]:
        """Scale, shift, drop if the model asks for it, and activate."""
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]


@torch.no_grad()
def finish_step(modules: Iterable[nn.Module], num_groups: int, world: World) -> None:
    """Fold the step's groups into the running statistics: one collective for all layers together.

    running <- 0.9 running + 0.1 x the plain mean over the step's groups. Every rank of the world must call it once a
    step, after its last forward; `num_groups` counts the groups of the whole mini-batch.
    """
    norms = [module for module in modules if isinstance(module, CrossDeviceBatchNorm)]
    if not norms:
        return
    flat = torch.cat([tensor for norm in norms for tensor in (norm.step_mean, norm.step_var)])
    if not norms[0].lane.is_first:
        flat.zero_()  # every rank of a lane holds the same sums; one of them speaks
    world.all_reduce(flat)
    flat /= num_groups
    start = 0
    for norm in norms:
        mean, var = flat[start : start + norm.channels], flat[start + norm.channels : start + 2 * norm.channels]
        start += 2 * norm.channels
        norm.running_mean.lerp_(mean, RUNNING_MOMENTUM)
        norm.running_var.lerp_(var, RUNNING_MOMENTUM)
        norm.num_batches_tracked += 1
        norm.step_mean.zero_()
        norm.step_var.zero_()


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _all_reduce(tensor: Tensor, lane: Lane) -> Tensor:
    if lane.width > 1:
        distributed.all_reduce(tensor, group=lane.process_group)
    return tensor


class _CrossDeviceNorm(torch.autograd.Function):
    """Algorithm 1 forward, and its exact gradient: one more reduction of two sums a channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, eps: float, lane: Lane, two_pass: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, biased_var, count = _statistics(x.to(_statistics_dtype(x)), mask, lane, two_pass)
        inverse_std = (biased_var + eps).rsqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = weight * inverse_std
        shift = bias - mean * scale
        y = torch.addcmul(shift.reshape(shape), x.to(scale.dtype), scale.reshape(shape))
        if mask is not None:
            y = torch.where(mask > 0, y, bias.reshape(shape))
        ctx.save_for_backward(x, weight, mean, inverse_std, count, *(() if mask is None else (mask,)))
        ctx.lane = lane
        unbiased_var = biased_var * (count / (count - 1).clamp(min=1))
        ctx.mark_non_differentiable(mean, unbiased_var)
        return y.to(x.dtype), mean, unbiased_var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count, *rest = ctx.saved_tensors
        mask = rest[0] if rest else None
        dims, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        dy = gradients[0].to(mean.dtype)
        normalized = (x.to(mean.dtype) - mean.reshape(shape)) * inverse_std.reshape(shape)
        if mask is not None:
            dy = dy * mask
        sums = torch.stack([dy.sum(dims), (dy * normalized).sum(dims)])
        bias_gradient, weight_gradient = sums.clone()
        _all_reduce(sums, ctx.lane)
        mean_dy, mean_dy_normalized = (sums / count).reshape(2, *shape)
        scale = (weight * inverse_std).reshape(shape)
        dx = (dy - mean_dy - normalized * mean_dy_normalized) * scale
        if mask is not None:
            dx = dx * mask
        return dx.to(x.dtype), weight_gradient, bias_gradient, None, None, None, None


def _statistics(x: Tensor, mask: Tensor | None, lane: Lane, two_pass: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of the group, and the number of values a channel, over all ranks of the lane."""
    dims = [0, *range(2, x.dim())]
    shape = (1, -1, *[1] * (x.dim() - 2))
    per_row = 1
    for length in x.shape[2:]:
        per_row *= length
    own_count = x.new_full((1,), x.shape[0] * per_row) if mask is None else mask.sum().reshape(1) * per_row
    masked = x if mask is None else x * mask
    if two_pass:  # Algorithm 1 to the letter: the mean first, then the centred squares
        sums = _all_reduce(torch.cat([masked.sum(dims), own_count]), lane)
        count = sums[-1].clamp(min=1)  # a group of padded rows alone has no value at all
        mean = sums[:-1] / count
        centered = x - mean.reshape(shape)
        centered = centered if mask is None else centered * mask
        return mean, _all_reduce((centered * centered).sum(dims), lane) / count, count
    # one collective: every rank's count, mean and centred squares, merged pairwise (Chan et al., 1983)
    own_mean = masked.sum(dims) / own_count.clamp(min=1)
    centered = x - own_mean.reshape(shape)
    centered = centered if mask is None else centered * mask
    own = torch.cat([own_count, own_mean, (centered * centered).sum(dims)])
    if lane.width == 1:
        own_count = own_count.clamp(min=1)
        return own_mean, own[1 + len(own_mean) :] / own_count, own_count[0]
    gathered = [torch.empty_like(own) for _ in range(lane.width)]
    distributed.all_gather(gathered, own, group=lane.process_group)
    parts = torch.stack(gathered)
    counts = parts[:, :1]
    means, squares = parts[:, 1 : 1 + len(own_mean)], parts[:, 1 + len(own_mean) :]
    count = counts.sum().clamp(min=1)
    mean = (counts * means).sum(0) / count
    squares = squares.sum(0) + (counts * (means - mean) ** 2).sum(0)
    return mean, squares / count, count
