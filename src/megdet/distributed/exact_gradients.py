"""Gradients of images, summed over images, micro-batches and ranks in fixed point, so that they have one value.

Each image's gradient of a parameter is added as it is made and freed. Once a step the ranks add up the integers, and
the sums become numbers again, divided by the images of the mini-batch.
"""

import threading
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from megdet.distributed.fixed_point import GRADIENT_BITS, add_numbers
from megdet.distributed.gradients import GradientBuckets
from megdet.distributed.world import World

_PART = 1 << 16
"""Numbers that are turned back together, which stay in a processor's cache."""


class ExactGradients(GradientBuckets):
    """The gradients of some parameters; used as `GradientBuckets`, but images are added by `add`.

    Where a gradient of an image was not finite, or above 2^10 in one place, the whole gradient of that parameter is NaN
    on every rank.

    Args:
        parameters: those that are trained.
        world: all ranks.
        num_images: of a mini-batch, up to `recipe.MOST_EXACT_IMAGES`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World, num_images: int) -> None:
        super().__init__(parameters, world)
        self.num_images = num_images
        self._sums: list[Tensor | None] = [None] * len(self.parameters)
        """of each parameter that an image has given a gradient"""
        self._misfits: list[int | Tensor] = [0] * len(self.parameters)
        """for each parameter how many gradients did not fit"""
        self._locks = [threading.Lock() for _ in self.parameters]

    def add(self, place: int, gradient: Tensor) -> None:
        """Add an image's gradient of the parameter at a place in `parameters`, in that parameter's memory format."""
        with self._locks[place], torch.no_grad():
            total, values = self._sums[place], _flat(gradient)
            begins = total is None
            if total is None:
                total = self._sums[place] = torch.empty(len(values), dtype=torch.int64, device=values.device)
            fits = add_numbers(total, values, GRADIENT_BITS, begins=begins)
            self._misfits[place] += (~fits).to(torch.int64)

    def zero(self) -> None:
        """Start a step: forget all gradients."""
        super().zero()
        self._begin()

    def begin_again(self) -> None:
        """Forget the gradients since `zero` or `set_aside`."""
        super().begin_again()
        self._begin()

    def set_aside(self) -> list[Tensor]:
        """Add up over all ranks and begin anew; returns the gradients so far, in the order of `parameters`."""
        self.finish()
        gradients = self.gradients
        self.zero()
        return gradients

    def finish(self) -> None:
        """Add up over all ranks; every parameter then has its gradient."""
        if not self.parameters:
            return
        sums = [
            torch.zeros(parameter.numel(), dtype=torch.int64, device=parameter.device) if known is None else known
            for parameter, known in zip(self.parameters, self._sums, strict=True)
        ]
        nothing = sums[0].new_zeros(())
        counts = torch.stack([nothing + found for found in self._misfits])
        self._begin()
        for work in self._reduced([*sums, counts]):
            work.wait()
        scale = 2.0**-GRADIENT_BITS / self.num_images
        factors = torch.full_like(counts, scale, dtype=torch.float64).masked_fill_(counts > 0, torch.nan)
        for place, parameter in enumerate(self.parameters):
            parameter.grad = torch.empty_like(parameter)
            # freed one by one, and in parts: a step's memory could peak here
            total, sums[place] = sums[place], nothing
            parts = zip(torch.split(_flat(parameter.grad), _PART), torch.split(total, _PART), strict=True)
            for numbers, own in parts:
                numbers.copy_(own.double().mul_(factors[place]))

    def _begin(self) -> None:
        self._sums, self._misfits = [None] * len(self.parameters), [0] * len(self.parameters)

    def _reduced(self, tensors: list[Tensor]) -> list[distributed.Work]:
        if self.world.size == 1:
            return []
        works = [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
        return [work for work in works if work is not None]


def _flat(tensor: Tensor) -> Tensor:
    """All numbers of a dense tensor as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
