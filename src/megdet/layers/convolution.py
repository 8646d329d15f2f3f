"""3 x 3 convolutions that run in Winograd's form where that is faster: float32 on a CPU, many channels, large maps."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megdet.ops.winograd import convolve_3x3, num_tiles

LEAST_CHANNELS = 128
"""Fewest channels: with fewer, moving the tiles costs as much as is saved (`bench/winograd.py`)."""
LEAST_TILES = 40
"""Fewest tiles: with fewer, reading the 36 sets of weights costs more than is saved."""


class Convolution3x3(nn.Conv2d):
    """A 3 x 3 convolution of stride 1 with padding 1, made from a plain one whose parameters it uses."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__(plain.in_channels, plain.out_channels, 3, padding=1, bias=False, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.train(plain.training)

    def forward(self, x: Float[Tensor, "images inputs height width"]) -> Float[Tensor, "images outputs height width"]:
        """The convolution of a map."""
        return self.of_levels([x])[0]

    def of_levels(
        self, levels: Sequence[Float[Tensor, "images inputs _ _"]]
    ) -> list[Float[Tensor, "images outputs _ _"]]:
        """The convolution of several maps, which together may be large enough for Winograd's form."""
        if self._is_faster(levels):
            return convolve_3x3(levels, self.weight, self.bias)
        return [super(Convolution3x3, self).forward(level) for level in levels]

    def _is_faster(self, levels: Sequence[Tensor]) -> bool:
        first = levels[0]
        is_plain = first.device.type == "cpu" and first.dtype == self.weight.dtype == torch.float32
        if not is_plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        tiles = sum(len(level) * num_tiles(level.shape[2], level.shape[3]) for level in levels)
        return tiles >= LEAST_TILES


def convolved_levels(
    convolution: nn.Module, levels: Sequence[Float[Tensor, "images inputs _ _"]]
) -> list[Float[Tensor, "images outputs _ _"]]:
    """A convolution of every level of a pyramid, of all at once if the layer can."""
    if isinstance(convolution, Convolution3x3):
        return convolution.of_levels(levels)
    return [convolution(level) for level in levels]


def speed_up_convolutions(model: nn.Module) -> None:
    """Replace the 3 x 3 convolutions of a model that may run in Winograd's form; parameters stay the same objects."""
    new = {old: Convolution3x3(old) for old in model.modules() if type(old) is nn.Conv2d and _is_eligible(old)}
    for module in list(model.modules()):
        for name, child in module._modules.items():  # named_children lists a layer that is used twice only once
            if child in new:
                module.register_module(name, new[child])


def _is_eligible(module: nn.Conv2d) -> bool:
    return (
        (module.kernel_size, module.stride, module.padding, module.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and module.groups == 1
        and module.padding_mode == "zeros"
        and min(module.in_channels, module.out_channels) >= LEAST_CHANNELS
    )
