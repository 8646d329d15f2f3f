"""Cross-device batch normalisation (Sec. 3.3, Figure 3, Algorithm 1).

A group of `bn_size` images shares one mean and one variance, however many devices carry it. The layer is given its lane
(the ranks that carry a group together) and needs nothing else. In a lane of one rank it computes what torch's own batch
norm computes, more exactly.

Running statistics change once a step: the forwards of a step only add up the groups' means and unbiased variances, and
`finish_step` folds their plain mean over all groups of the mini-batch into the running statistics. For a training loop
without that call, a layer made with `fold_momentum` folds in every forward.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.distributed.lane import SINGLE_LANE, Lane, lane_of_all
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.layers.cross_device import CrossDeviceNorm, Moments, lane_moments, mean_over_lanes, normalize
from megdet.layers.image_team import current_image
from megdet.layers.moments import statistics_dtype
from megdet.layers.recompute import current_tape
from megdet.layers.recomputed_outputs import mark_recomputable

RUNNING_MOMENTUM = 0.1


class CrossDeviceBatchNorm(nn.Module):
    """Batch norm over the group that a lane carries; its state dict is that of `nn.BatchNorm2d`.

    In training the input is this rank's share of the group, `(n, channels, ...)` with n >= 0; every rank of the lane
    must call the layer in the same order, once a group. Statistics are weighted by the number of values of each share
    and kept in float32 (float64 for float64 input) whatever the precision of the input. Evaluation uses the running
    statistics.

    Args:
        channels: channels of the input.
        eps: added to the variance.
        lane: the ranks that carry a group together.
        two_pass: Algorithm 1 to the letter, with two collectives forward instead of one.
        fold_momentum: with a number, every forward folds the plain mean over the groups of all processes into the
            running statistics, with this weight; all processes must call the layer. With None, `finish_step` does.

    `eval()` raises InputError while groups wait to be folded.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    step_mean: Tensor
    step_var: Tensor

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        *,
        lane: Lane = SINGLE_LANE,
        two_pass: bool = False,
        fold_momentum: float | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.eps, self.lane, self.two_pass = channels, eps, lane, two_pass
        self.fold_momentum = fold_momentum
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
        """Normalise; rows with `is_valid` false enter no statistic and come out as if they were the mean.

        Raises InputError if a group has one value a channel, which has no variance. A lane of GPUs would have to wait
        for that number, so there the output is the bias.
        """
        has_no_group = self.lane.width == 1 and x.shape[0] == 0 and current_image() is None
        if has_no_group and self.training:
            with torch.no_grad():
                self._remember_nothing()
        if has_no_group or not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        is_alone = self.lane.width == 1 and is_valid is None and current_image() is None
        if torch.compiler.is_compiling():
            if is_alone and not self._folds_all_lanes():
                return self._local(x)
            return self._outside_a_graph(x, is_valid)  # type: ignore[no-any-return]  # torch's decorator has no types
        return self._local(x) if is_alone else self._together(x, is_valid)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's, which has no types
    def _outside_a_graph(self, x: Tensor, is_valid: Tensor | None) -> Tensor:
        """The forward with collectives; never part of a compiled graph, since the compiler could reorder them."""
        return self._together(x, is_valid)

    def _together(self, x: Tensor, is_valid: Tensor | None) -> Tensor:
        mask = None
        if is_valid is not None:
            mask = is_valid.reshape(-1, *[1] * (x.dim() - 1)).to(statistics_dtype(x))
        tape = current_tape()
        known = tape.next() if tape is not None and tape.is_replayed else None
        with torch.no_grad():
            moments = known or self._moments(x, mask)
        y = CrossDeviceNorm.apply(x, self.weight, self.bias, mask, self.eps, self.lane, moments)
        if known is None and mask is None:
            kept = x.detach(), self.weight.detach(), self.bias.detach()
            mark_recomputable(y, lambda: normalize(*kept, moments.mean, moments.inverse_std, self.eps))
        return y  # type: ignore[no-any-return]  # `apply` of torch's has no types

    def _moments(self, x: Tensor, mask: Tensor | None) -> Moments:
        moments = lane_moments(x, mask, self.eps, self.lane, two_pass=self.two_pass)
        # on a GPU this would wait for the device
        if mask is None and isinstance(moments.num_values, float) and moments.num_values < 2:
            raise self._no_variance(x)
        mean, var = moments.mean, moments.unbiased_var
        if mask is not None:  # a group of padded rows only must not change the running statistics
            has_values = torch.as_tensor(moments.num_values, device=x.device) > 0
            mean, var = mean.where(has_values, self.running_mean), var.where(has_values, self.running_var)
        self._remember(mean, var)
        if (tape := current_tape()) is not None:
            tape.record(moments)
        return moments

    def _local(self, x: Tensor) -> Tensor:
        """torch's own kernel: no collective, and no wait for the device."""
        if x.numel() // self.channels < 2:
            raise self._no_variance(x)
        # running statistics of momentum 1 are the batch's own: its mean and its unbiased variance
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        if x.is_cuda:  # CUDA has different kernels for training and for given statistics
            y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        else:
            y, found, inverse_std = torch.native_batch_norm(x, self.weight, self.bias, mean, var, True, 1.0, self.eps)
            kept, scale = x.detach(), self.weight.detach() * inverse_std
            bias, ones = self.bias.detach(), torch.ones_like(found)
            mark_recomputable(y, lambda: F.batch_norm(kept, found, ones, scale, bias, False, 0.0, 0.0))
        tape = current_tape()
        if tape is None or not tape.is_replayed:
            with torch.no_grad():
                self._remember(mean, var)
        return y

    def _no_variance(self, x: Tensor) -> InputError:
        return InputError(
            f"batch norm of {self.channels} channels over a group with one value each (feature map {tuple(x.shape)}) "
            "has no variance: use a larger bn_size or larger images"
        )

    def _remember(self, mean: Tensor, var: Tensor) -> None:
        if (image := current_image()) is not None and not image.is_first:
            return
        if self.fold_momentum is None:
            self.step_mean += mean
            self.step_var += var
            return
        if self._folds_all_lanes():
            mean, var = mean_over_lanes(mean, var)
        self._fold(mean, var)

    def _remember_nothing(self) -> None:
        """Fold nothing: this rank has no group in this forward, but other ranks may have one."""
        if self._folds_all_lanes():
            self._fold(*mean_over_lanes(self.running_mean, self.running_var, num_groups=0))

    def _folds_all_lanes(self) -> bool:
        """Whether every forward folds the groups of other lanes too."""
        return self.fold_momentum is not None and lane_of_all().width > self.lane.width

    def _fold(self, mean: Tensor, var: Tensor) -> None:
        assert self.fold_momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.fold_momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.fold_momentum)
        self.num_batches_tracked += 1

    def train(self, mode: bool = True) -> Any:
        """As in any module, but evaluation is refused while groups wait for `finish_step`."""
        has_values = not self.step_mean.is_meta
        if self.training and not mode and has_values and (self.step_mean.any() or self.step_var.any()):
            raise InputError(
                "a batch norm cannot evaluate yet: its running statistics lack the groups since the last finish_step: "
                "call megdet.layers.batch_norm.finish_step once a step, or let every forward fold its group, with "
                "convert_batch_norm or fold_momentum=0.1"
            )
        return super().train(mode)

    def extra_repr(self) -> str:
        """Size, eps and lane, for print()."""
        return f"{self.channels}, eps={self.eps}, lane_width={self.lane.width}"


class BatchNormAct(CrossDeviceBatchNorm):
    """Cross-device batch norm followed by an activation, for timm's fused `BatchNormAct2d`."""

    def __init__(self, channels: int, eps: float, act: nn.Module, drop: nn.Module, **options: Any) -> None:
        super().__init__(channels, eps, **options)
        self.act, self.drop = act, drop

    def forward(
        self, x: Float[Tensor, "n channels *rest"], is_valid: Bool[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n channels *rest"]:
        """Normalise, apply the model's dropout if it has one, and activate."""
        return self.act(self.drop(super().forward(x, is_valid)))  # type: ignore[no-any-return]


@torch.no_grad()
def finish_step(
    modules: Iterable[nn.Module],
    num_groups: int,
    world: World,
    unless: Bool[Tensor, ""] | None = None,
    rows: Float[Tensor, "groups _"] | None = None,
) -> None:
    """Fold the step's groups into the running statistics: one collective for all layers together.

    running <- 0.9 running + 0.1 x the plain mean over the step's groups. Every rank of the world must call it once a
    step, after its last forward; `num_groups` counts the groups of the whole mini-batch. If the flag `unless` on the
    device is true, the running statistics stay as they are and the groups are dropped. If the groups were taken
    one by one (`take_step_sums`), `rows` has a row for each group of the step, in the order of the plan.
    """
    found = _take_means(modules, num_groups, world, rows)
    if found:  # a few launches for all layers: on a GPU many small ones would cost more than the work
        running = [tensor for norm, _, _ in found for tensor in (norm.running_mean, norm.running_var)]
        means = [tensor for _, *own in found for tensor in own]
        counts = [norm.num_batches_tracked for norm, _, _ in found]
        if unless is not None:
            means = _replaced(means, running, unless)
        torch._foreach_lerp_(running, means, RUNNING_MOMENTUM)
        one = torch.ones_like(counts[0]) if unless is None else (~unless).to(counts[0].dtype)
        torch._foreach_add_(counts, [one] * len(counts))  # with one tensor for all torch would wait for its value


@torch.no_grad()
def set_statistics(modules: Iterable[nn.Module], num_groups: int, world: World) -> None:
    """Replace the running statistics by the plain mean over all groups since the last `finish_step`.

    Every rank of the world must call it after its last forward; `num_groups` counts the groups of all ranks.
    """
    for norm, mean, var in _take_means(modules, num_groups, world):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


def step_sums(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The sums of the groups' means and variances in this step so far, as tensors that may be changed in place."""
    norms = (module for module in modules if isinstance(module, CrossDeviceBatchNorm))
    return [tensor for norm in norms for tensor in (norm.step_mean, norm.step_var)]


@torch.no_grad()
def take_step_sums(modules: Iterable[nn.Module]) -> Float[Tensor, " numbers"] | None:
    """`step_sums` as one row of numbers, which restart at 0; None where there are none."""
    sums = step_sums(modules)
    if not sums:
        return None
    row = torch.cat(sums)
    torch._foreach_zero_(sums)
    return row


def has_statistics(model: nn.Module) -> bool:
    """Whether a model has batch norms whose statistics are estimated, not frozen."""
    return any(isinstance(module, CrossDeviceBatchNorm) for module in model.modules())


def _replaced(means: list[Tensor], running: list[Tensor], where: Tensor) -> list[Tensor]:
    """The means, or if the flag is true the running statistics themselves, so that an update does not change them."""
    chosen = torch.where(where, torch.cat(running), torch.cat(means))
    return list(torch.split(chosen, [len(own) for own in means]))


def _take_means(
    modules: Iterable[nn.Module], num_groups: int, world: World, rows: Tensor | None = None
) -> list[tuple[CrossDeviceBatchNorm, Tensor, Tensor]]:
    """For every layer the mean over all groups of their means and unbiased variances; the sums restart at 0."""
    norms = [module for module in modules if isinstance(module, CrossDeviceBatchNorm)]
    if not norms:
        return []
    if rows is None:
        flat = torch.cat([tensor for norm in norms for tensor in (norm.step_mean, norm.step_var)])
        if not norms[0].lane.is_first:
            flat.zero_()  # every rank of a lane holds the same sums; only the first contributes them
        world.all_reduce(flat)
    else:
        flat = rows.sum(0)
    flat /= num_groups
    parts = iter(torch.split(flat, [norm.channels for norm in norms for _ in range(2)]))
    torch._foreach_zero_([tensor for norm in norms for tensor in (norm.step_mean, norm.step_var)])
    return [(norm, next(parts), next(parts)) for norm in norms]
