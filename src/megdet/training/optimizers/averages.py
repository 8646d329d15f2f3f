"""Averages of weights over the steps of a run (EMA), which are evaluated instead of the weights."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average of weights and buffers; the decay of early steps is (1 + t) / (10 + t)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """The averages by name, for a checkpoint and for evaluations."""
        return self.tensors

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, tensor in state.items():
            self.tensors[name].copy_(tensor)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, unless: Bool[Tensor, ""] | None = None) -> None:
        """Add the state after step 0, 1, ... to the average, unless the flag `unless` (on the device) is true."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        floats: list[tuple[Tensor, Tensor]] = []
        for name, tensor in _state(model):
            if tensor.is_floating_point():
                mine = self.tensors[name]
                floats.append((mine, tensor if unless is None else torch.where(unless, mine, tensor)))
            else:
                self.tensors[name].copy_(tensor)
        torch._foreach_lerp_([mine for mine, _ in floats], [theirs for _, theirs in floats], weight)


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.detach()) for name, tensor in model.state_dict().items())
