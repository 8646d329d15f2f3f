"""SGD with momentum, its state by name, and the moving average of the weights."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.recipe import Optimizer as OptimizerRecipe


def make_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.SGD:
    """SGD over the trained parameters; norm layers and biases without decay where the recipe says so."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in model.modules():
        is_norm = isinstance(module, (CrossDeviceBatchNorm, nn.GroupNorm, nn.LayerNorm))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                exempt = not recipe.decay_norm_and_bias and (is_norm or name == "bias")
                (plain if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=0.0, momentum=recipe.momentum, fused=True)


def momentum_by_name(model: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """The momentum of every parameter that has moved, for a checkpoint."""
    states = {name: optimizer.state[p].get("momentum_buffer") for name, p in model.named_parameters()}
    return {name: momentum for name, momentum in states.items() if momentum is not None}


def restore_momentum(model: nn.Module, optimizer: torch.optim.SGD, momentum: dict[str, Tensor]) -> None:
    """Put the momentum of a checkpoint back."""
    for name, parameter in model.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(parameter, memory_format=torch.preserve_format)
            optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(momentum[name])


class MovingAverage:
    """Exponential moving average of weights and buffers; early steps average over fewer (decay (1+t)/(10+t))."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average the state after step 0, 1, ... in."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        floats: list[tuple[Tensor, Tensor]] = []
        for name, tensor in _state(model):
            if tensor.is_floating_point():
                floats.append((self.tensors[name], tensor))
            else:
                self.tensors[name].copy_(tensor)
        torch._foreach_lerp_([mine for mine, _ in floats], [theirs for _, theirs in floats], weight)


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.detach()) for name, tensor in model.state_dict().items())
