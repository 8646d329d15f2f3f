"""The watch for divergence: decides on the device, without waiting, whether the update of a step is applied.

An update is left out if a loss or the norm of the gradient is not finite, or if the norm is above `watch.explodes_at`
times the median of the norms of the last `watch.window` updates that were applied; before there are so many, no finite
norm explodes. Weights, momentum, averages, running statistics, and the state of AGVM and of the noise scale are then
those before the step. The decision follows from the run's own history, which is part of a checkpoint, so it is the same
on any devices and after a resume.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megdet.recipe import Watch


@dataclass(frozen=True)
class Verdict:
    """The watch's decision on a step; both tensors are on the device and may not be computed yet."""

    is_left_out: Tensor
    """whether the update is not applied"""
    limit: Tensor
    """the gradient norm above which an update is left out, in float64; infinite if there is no limit yet"""


class GradientWatch:
    """The norms of the last updates, by which the next is judged.

    Args:
        recipe: `recipe.watch`.
        device: the device of the norms.
    """

    def __init__(self, recipe: Watch, device: torch.device) -> None:
        self.recipe = recipe
        self.recent = torch.zeros(recipe.window, dtype=torch.float64, device=device)
        self.num_applied = torch.zeros((), dtype=torch.long, device=device)
        self.num_left_out = torch.zeros((), dtype=torch.long, device=device)
        self._places = torch.arange(recipe.window, device=device)

    def state(self) -> dict[str, Tensor]:
        """The norms, for a checkpoint."""
        return {"recent": self.recent, "num_applied": self.num_applied, "num_left_out": self.num_left_out}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def judge(self, losses: Tensor, norm: Tensor) -> Verdict:
        """Judge a step by its losses and the norm of its gradient before clipping, and remember the norm."""
        norm, limit = norm.double(), self._limit()
        is_applied = losses.isfinite().all() & norm.isfinite() & (norm <= limit)
        is_place = (self._places == self.num_applied % len(self.recent)) & is_applied
        self.recent.copy_(torch.where(is_place, norm, self.recent))
        self.num_applied += is_applied
        self.num_left_out += ~is_applied
        return Verdict(~is_applied, limit)

    def _limit(self) -> Tensor:
        """The limit for the next norm; infinite without enough norms, and if half of them are 0."""
        none = torch.full_like(self.recent[0], torch.inf)
        if not self.recipe.explodes_at:
            return none
        median = self.recent.sort().values[(len(self.recent) - 1) // 2]
        has_limit = (self.num_applied >= len(self.recent)) & (median > 0)
        return torch.where(has_limit, self.recipe.explodes_at * median, none)
