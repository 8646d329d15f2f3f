"""AGVM: a rate for each module of the detector, by the variance of its gradient relative to the backbone's.

Adaptive gradient variance modulator, Xue et al., "Large-batch Optimization for Dense Visual Predictions", NeurIPS 2022.
The modules of a detector see different numbers of samples an image, so at a large mini-batch the variances of their
gradients drift apart. On the first step after warmup and every INTERVAL steps from then, for every module i,

    v_i   = 1 - cos(g_A, g_B)                                     the gradients of the two halves of the mini-batch
    s_i   = sqrt(clip((v_backbone + 1e-6) / (v_i + 1e-6), 0.5, 10))
    phi_i <- 0.97 phi_i + 0.03 s_i                                from 1

and the rate of module i is phi_i times the scheduled one, in every step. With AdamW g_A and g_B are divided by the root
of the optimizer's second moment first. The gradients are those before clipping; clipping would scale both halves of a
module alike and not change the cosine.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from megdet.training.optimizers.parts import Parts, chosen, dot

INTERVAL = 10
MEMORY = 0.97
_CLIP = (0.5, 10.0)
_FLOOR = 1e-6
_SMALLEST = 1e-300


class Agvm:
    """The factors phi of all modules, which are part of a checkpoint.

    Args:
        parts: the modules, each with the indices of its parameters in `parameters`.
        reference: the module that the others are compared with; in the paper the backbone.
        parameters: all trained parameters.
        optimizer: SGD or AdamW; each of its groups names its "module".
        warmup_steps: steps before the first measurement.
        device: the device of the factors.
    """

    def __init__(
        self,
        parts: Parts,
        reference: str,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        warmup_steps: int,
        device: torch.device,
    ) -> None:
        self.parts, self.parameters, self.optimizer, self.warmup_steps = parts, parameters, optimizer, warmup_steps
        self.factors = torch.ones(len(parts), dtype=torch.float64, device=device)
        self._settled = self.factors.clone()
        self._reference = list(parts).index(reference)

    def state(self) -> dict[str, Tensor]:
        """The factors, for a checkpoint."""
        return {"factors": self.factors}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.factors.copy_(state["factors"])
        self._settled = self.factors.clone()

    def is_due(self, step: int) -> bool:
        """Whether to measure in step 0, 1, ..."""
        return step >= self.warmup_steps and (step - self.warmup_steps) % INTERVAL == 0

    @torch.no_grad()
    def update(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """Update the factors from the gradients of two equal halves, each divided by the images of both.

        Gradients that are not finite, as those of a step that a loss scaler skips, leave the factors as they are.

        Returns v and the new factors of every module, (2, modules), on the device.
        """
        disagreements = torch.stack([self._disagreement(first, second, places) for places in self.parts.values()])
        ratios = (disagreements[self._reference] + _FLOOR) / (disagreements + _FLOOR)
        found = self.factors.lerp(ratios.clamp(*_CLIP).sqrt(), 1 - MEMORY)
        self.factors.copy_(torch.where(found.isfinite().all(), found, self.factors))
        return torch.stack([disagreements, self.factors])

    def settle(self, is_left_out: Bool[Tensor, ""]) -> None:
        """End a step; if its update is left out (a flag on the device), the factors are those before the step."""
        self.factors.copy_(torch.where(is_left_out, self._settled, self.factors))
        self._settled = self.factors.clone()

    def set_rates(self, rate: float) -> None:
        """Give every group of the optimizer its module's share of the scheduled rate."""
        # float32 in every precision, because torch's fused kernels read it as float32
        rates = dict(zip(self.parts, (self.factors * rate).float().unbind(), strict=True))
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["module"]]

    def named(self, values: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
        """The result of `update`, as numbers by module, for a line of metrics."""
        return {
            module: {"disagreement": disagreement, "rate_factor": factor}
            for module, disagreement, factor in zip(self.parts, *values, strict=True)
        }

    def _disagreement(self, first: Sequence[Tensor], second: Sequence[Tensor], places: Sequence[int]) -> Tensor:
        ours, theirs = chosen(first, places), chosen(second, places)
        if isinstance(self.optimizer, torch.optim.AdamW):
            roots = self._root_moments(ours, theirs, places)
            ours, theirs = list(torch._foreach_div(ours, roots)), list(torch._foreach_div(theirs, roots))
        lengths = (dot(ours, ours) * dot(theirs, theirs)).sqrt()
        # a gradient of zeros has no direction: the cosine is taken as 0
        return 1 - dot(ours, theirs) / lengths.clamp(min=_SMALLEST)

    def _root_moments(self, first: list[Tensor], second: list[Tensor], places: Sequence[int]) -> list[Tensor]:
        """The roots of AdamW's second moments; before its first step, of the mean square of the halves."""
        states: list[dict[str, Any]] = [
            self.optimizer.state[parameter] for parameter in chosen(self.parameters, places)
        ]
        if all("exp_avg_sq" in state for state in states):
            roots = list(torch._foreach_sqrt([state["exp_avg_sq"] for state in states]))
        else:
            roots = list(torch._foreach_mul(first, first))
            torch._foreach_addcmul_(roots, second, second)
            torch._foreach_mul_(roots, 0.5)
            torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, self.optimizer.param_groups[0]["eps"])
        return roots
