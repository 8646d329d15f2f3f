"""The gradient noise scale while training: at which size of mini-batch does another image stop to pay?

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training". The simple noise scale tr(Sigma) / |G|^2 counts
images: G is the gradient over all images, Sigma the covariance of one image's. Mini-batches far below it waste steps,
those far above it waste images. Of two independent means g_A over a images and g_B over b images

    <g_A, g_B>                              has the mean |G|^2
    |g_A - g_B|^2 / (1/a + 1/b)             has the mean tr(Sigma)

For a = b these are the two estimators of their Appendix A.1 with B_small = a and B_big = 2a, to the letter: the mean of
|g_A|^2 and |g_B|^2 for |G_small|^2 and |g_A + g_B|^2 / 4 for |G_big|^2 give (2a |G_big|^2 - a |G_small|^2) / a =
<g_A, g_B> and (|G_small|^2 - |G_big|^2) / (1/a - 1/2a) = |g_A - g_B|^2 a / 2. Unlike theirs the form above holds for
unequal halves too. Each is unbiased alone; their ratio is not, so the ratio is that of their exponential averages, and
how many measurements are in these is logged beside it.

g_A and g_B are the gradients of the two halves of the mini-batch's groups: two, however many groups there are, because
that takes the memory of one more gradient and one more reduction. With one group a step there are no halves:
then the gradients of two successive steps are compared, whose weights differ by one update, which counts as noise.

The sampling unit is the group. tr(Sigma) is bn_size times the variance of a group's mean gradient; where images of a
group are independent, which is nearly so under frozen statistics and group norm, that is the variance of one image's.
Under batch norm they share statistics: the number is then the variance of an image plus (bn_size - 1) times the
covariance of two images of one group, and G is the mean gradient over groups of this size. So it predicts what more
groups of the same BN size bring, and scales measured at different BN sizes do not compare.
The gradient is the raw one, before it is clipped.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megdet.recipe import Recipe
from megdet.training.optimizers.optimizer import like_parameter
from megdet.training.optimizers.parts import Parts, dots

MEMORY = 0.95
"""What a measurement leaves of the averages before it: they reach over about 20 measurements."""
NUMBERS = ("gradient_sq", "variance", "scale")


class NoiseScale:
    """The averages of both estimates by module and for the whole model, which belong to a checkpoint.

    Args:
        parts: the modules.
        parameters: all trained ones by name, in the order that the parts count.
        recipe: how often, and what a step's groups are.
        device: of the averages.
    """

    def __init__(
        self, parts: Parts, parameters: Mapping[str, nn.Parameter], recipe: Recipe, device: torch.device
    ) -> None:
        self.parts, self.parameters, self.interval = parts, parameters, recipe.noise_interval
        self.batch_size, self.images_per_group = recipe.batch_size, recipe.images_per_group
        self.averages = torch.zeros(2, len(parts) + 1, dtype=torch.float64, device=device)
        self.kept: list[Tensor] = []
        """the gradient of the last step, where the next one is compared with it"""

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: the averages, and the gradient that waits for that of the next step."""
        kept = zip(self.parameters, self.kept, strict=False)  # empty where none waits
        return {"averages": self.averages, **{f"gradient.{name}": gradient for name, gradient in kept}}

    def layout(self, steps_done: int) -> dict[str, Tensor]:
        """Tensors of the names, shapes and dtypes of `state` after so many steps."""
        waits = bool(steps_done) and self.keeps_gradient(steps_done)
        kept = {f"gradient.{name}": parameter for name, parameter in self.parameters.items()} if waits else {}
        return {"averages": self.averages, **kept}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        self.averages.copy_(state["averages"])
        kept = [(state.get(f"gradient.{name}"), parameter) for name, parameter in self.parameters.items()]
        self.kept = [like_parameter(tensor, parameter) for tensor, parameter in kept if tensor is not None]

    @property
    def compares_halves(self) -> bool:
        """Whether a mini-batch has halves; if not, two successive steps are compared."""
        return self.batch_size > self.images_per_group

    def is_due(self, step: int) -> bool:
        """Whether step 0, 1, ... measures: those after which a multiple of the interval is done."""
        return (step + 1) % self.interval == 0

    def keeps_gradient(self, steps_done: int) -> bool:
        """Whether the gradient of the last of so many steps waits for that of the next one."""
        return not self.compares_halves and self.is_due(steps_done)

    def num_measured(self, step: int) -> int:
        """How many measurements the averages hold after step 0, 1, ... of a run."""
        # the first step of all has no step before it to be compared with
        return (step + 1) // self.interval - (self.interval == 1 and not self.compares_halves)

    def of_halves(self, first: Sequence[Tensor], second: Sequence[Tensor], step: int) -> Tensor:
        """Measure by the gradients of the two halves, each a sum over its images divided by the images of both."""
        num_groups = self.batch_size // self.images_per_group
        images = -(-num_groups // 2) * self.images_per_group
        return self._measure(first, second, images, self.batch_size - images, step)

    def of_steps(self, gradients: Sequence[Tensor], step: int) -> Tensor | None:
        """Keep the gradient of a step where the next one measures, and measure where this one does."""
        found = None
        if self.is_due(step) and self.kept:
            size = self.batch_size
            found = self._measure(self.kept, gradients, size, size, step)
        self.kept = [gradient.clone() for gradient in gradients] if self.keeps_gradient(step + 1) else []
        return found

    @torch.no_grad()
    def _measure(
        self, first: Sequence[Tensor], second: Sequence[Tensor], images: int, others: int, step: int
    ) -> Tensor:
        """NUMBERS of every module and the model and how many measurements the last is of, (4, modules + 1).

        From sums over `images` and `others` images, both divided by the mini-batch.
        """
        to_mean, to_others_mean = self.batch_size / images, self.batch_size / others
        product = dots(self.parts, first, second) * (to_mean * to_others_mean)
        squares = dots(self.parts, first, first) * to_mean**2 + dots(self.parts, second, second) * to_others_mean**2
        variance = (squares - 2 * product) / (1 / images + 1 / others)
        estimates = torch.stack([product, variance])
        estimates = torch.cat([estimates, estimates.sum(1, keepdim=True)], 1)
        self.averages.lerp_(estimates, 1 - MEMORY)
        # both averages start from 0 and would be corrected by the same factor, which a ratio does not feel
        gradient_sq, variance = self.averages
        scale = torch.where(gradient_sq > 0, variance / gradient_sq, math.inf)
        count = torch.full_like(scale, self.num_measured(step))
        return torch.cat([estimates, torch.stack([scale, count])])

    def named(self, values: Sequence[Sequence[float]]) -> dict[str, object]:
        """What a measurement found, read from the device: for a line of metrics."""
        *numbers, counts = values
        estimator = "halves" if self.compares_halves else "successive steps"
        by_module = {
            module: dict(zip(NUMBERS, own, strict=True))
            for module, own in zip((*self.parts, "model"), zip(*numbers, strict=True), strict=True)
        }
        return {"estimator": estimator, "measurements": int(counts[-1]), **by_module}
