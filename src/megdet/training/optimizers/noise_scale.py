"""The gradient noise scale, measured while training: above which mini-batch do more images gain little?

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training". The simple noise scale tr(Sigma) / |G|^2 is in
images: G is the gradient over all images, Sigma the covariance of one image's. Mini-batches far below it waste steps,
those far above it waste images. For two independent means g_A over a images and g_B over b images

    <g_A, g_B>                              has the mean |G|^2
    |g_A - g_B|^2 / (1/a + 1/b)             has the mean tr(Sigma)

For a = b these are exactly the two estimators of their Appendix A.1 with B_small = a and B_big = 2a: the mean of
|g_A|^2 and |g_B|^2 for |G_small|^2 and |g_A + g_B|^2 / 4 for |G_big|^2 give (2a |G_big|^2 - a |G_small|^2) / a = <g_A,
g_B> and (|G_small|^2 - |G_big|^2) / (1/a - 1/2a) = |g_A - g_B|^2 a / 2. The form above also holds for unequal halves.
Each estimate is unbiased, but their ratio is not. So the scale is the ratio of their exponential averages; the number
of measurements in the averages is logged beside it.

g_A and g_B are the gradients of the two halves of the mini-batch's groups. Two gradients, for any number of groups,
need the memory of only one more gradient and one more reduction. With one group a step there are no halves. Then the
gradients of two successive steps are compared; their weights differ by one update, which counts as noise.

The sampling unit is the group. tr(Sigma) is bn_size times the variance of a group's mean gradient. Where the images of
a group are independent, as nearly under frozen statistics and group norm, that is the variance of one image's gradient.
Under batch norm they share statistics: it is then the variance of an image plus (bn_size - 1) times the covariance of
two images of one group, and G is the mean gradient over groups of this size. So it predicts the effect of more groups
of the same BN size; scales measured at different BN sizes do not compare. The gradient is taken before clipping.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from megdet.recipe import Recipe
from megdet.training.optimizers.optimizer import like_parameter
from megdet.training.optimizers.parts import Parts, dots

MEMORY = 0.95
"""Decay of the averages per measurement: they span about 20 measurements."""
NUMBERS = ("gradient_sq", "variance", "scale")


class NoiseScale:
    """The averages of both estimates by module and for the whole model, which are part of a checkpoint.

    Args:
        parts: the modules, each with the indices of its parameters in `parameters`.
        parameters: all trained parameters by name.
        recipe: gives the interval and the groups of a step.
        device: the device of the averages.
    """

    def __init__(
        self, parts: Parts, parameters: Mapping[str, nn.Parameter], recipe: Recipe, device: torch.device
    ) -> None:
        self.parts, self.parameters, self.interval = parts, parameters, recipe.noise_interval
        self.batch_size, self.images_per_group = recipe.batch_size, recipe.images_per_group
        self.averages = torch.zeros(2, len(parts) + 1, dtype=torch.float64, device=device)
        self._settled = self.averages.clone()
        self.kept: list[Tensor] = []
        """the gradient of the last step, if the next one is compared with it"""

    def state(self) -> dict[str, Tensor]:
        """The tensors for a checkpoint: the averages, and the gradient kept for the next step."""
        kept = zip(self.parameters, self.kept, strict=False)  # none, unless the next step needs it
        return {"averages": self.averages, **{f"gradient.{name}": gradient for name, gradient in kept}}

    def layout(self, steps_done: int) -> dict[str, Tensor]:
        """Tensors of the names, shapes and dtypes of `state` after so many steps."""
        waits = bool(steps_done) and self.keeps_gradient(steps_done)
        kept = {f"gradient.{name}": parameter for name, parameter in self.parameters.items()} if waits else {}
        return {"averages": self.averages, **kept}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.averages.copy_(state["averages"])
        self._settled = self.averages.clone()
        kept = [(state.get(f"gradient.{name}"), parameter) for name, parameter in self.parameters.items()]
        self.kept = [like_parameter(tensor, parameter) for tensor, parameter in kept if tensor is not None]

    @property
    def compares_halves(self) -> bool:
        """Whether the halves of a mini-batch are compared; with one group a step, two successive steps are compared."""
        return self.batch_size > self.images_per_group

    def is_due(self, step: int) -> bool:
        """Whether to measure in step 0, 1, ...: after it, the steps done are a multiple of the interval."""
        return (step + 1) % self.interval == 0

    def keeps_gradient(self, steps_done: int) -> bool:
        """Whether the gradient of the last of so many steps is kept for the next one."""
        return not self.compares_halves and self.is_due(steps_done)

    def num_measured(self, step: int) -> int:
        """How many measurements the averages hold after step 0, 1, ... of a run."""
        # the first step has no step before it
        return (step + 1) // self.interval - (self.interval == 1 and not self.compares_halves)

    def of_halves(self, first: Sequence[Tensor], second: Sequence[Tensor], step: int) -> Tensor:
        """Measure by the gradients of the two halves, each a sum over its images divided by the images of both."""
        num_groups = self.batch_size // self.images_per_group
        images = -(-num_groups // 2) * self.images_per_group
        return self._measure(first, second, images, self.batch_size - images, step)

    def of_steps(self, gradients: Sequence[Tensor], step: int) -> Tensor | None:
        """Measure if this step is due; keep its gradient if the next step is due."""
        found = None
        if self.is_due(step) and self.kept:
            size = self.batch_size
            found = self._measure(self.kept, gradients, size, size, step)
        self.kept = [gradient.clone() for gradient in gradients] if self.keeps_gradient(step + 1) else []
        return found

    def settle(self, is_left_out: Bool[Tensor, ""]) -> None:
        """End a step; if its update is left out (a flag on the device), its measurement is undone."""
        self.averages.copy_(torch.where(is_left_out, self._settled, self.averages))
        self._settled = self.averages.clone()
        for gradient in self.kept:
            gradient.masked_fill_(is_left_out, math.nan)

    @torch.no_grad()
    def _measure(
        self, first: Sequence[Tensor], second: Sequence[Tensor], images: int, others: int, step: int
    ) -> Tensor:
        """NUMBERS of every module and of the model, and the count of measurements, (4, modules + 1).

        The gradients are sums over `images` and `others` images, both divided by the mini-batch.
        """
        to_mean, to_others_mean = self.batch_size / images, self.batch_size / others
        product = dots(self.parts, first, second) * (to_mean * to_others_mean)
        squares = dots(self.parts, first, first) * to_mean**2 + dots(self.parts, second, second) * to_others_mean**2
        variance = (squares - 2 * product) / (1 / images + 1 / others)
        estimates = torch.stack([product, variance])
        estimates = torch.cat([estimates, estimates.sum(1, keepdim=True)], 1)
        averages = torch.lerp(self.averages, estimates, 1 - MEMORY)
        # no measurement if the step before was left out: the gradient kept for this one is invalid
        self.averages.copy_(torch.where(estimates.isfinite().all(), averages, self.averages))
        # both averages start from 0; the correction for that is the same factor and cancels in the ratio
        gradient_sq, variance = self.averages
        scale = torch.where(gradient_sq > 0, variance / gradient_sq, math.inf)
        count = torch.full_like(scale, self.num_measured(step))
        return torch.cat([estimates, torch.stack([scale, count])])

    def named(self, values: Sequence[Sequence[float]]) -> dict[str, object]:
        """A measurement as numbers, for a line of metrics."""
        *numbers, counts = values
        estimator = "halves" if self.compares_halves else "successive steps"
        by_module = {
            module: dict(zip(NUMBERS, own, strict=True))
            for module, own in zip((*self.parts, "model"), zip(*numbers, strict=True), strict=True)
        }
        return {"estimator": estimator, "measurements": int(counts[-1]), **by_module}
