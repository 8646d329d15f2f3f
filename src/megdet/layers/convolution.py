"""Convolutions in forms that are faster on a CPU than torch's: Winograd's, products of rows, dilated ones apart."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.ops.pointwise import convolve_1x1
from megdet.ops.products import onednn_is_faster
from megdet.ops.winograd import TILE, convolve_3x3, num_tiles

LEAST_CHANNELS = 256 if onednn_is_faster() else 128
"""Fewest channels: with fewer, moving the tiles costs as much as is saved (`bench/winograd.py`). Where MKL multiplies
at its full speed, the library's convolutions are further from it."""
LEAST_TILES = 150 if onednn_is_faster() else 40
"""Fewest tiles: with fewer, reading the 36 sets of weights costs more than is saved."""
MOST_PADDED = 1.2 if onednn_is_faster() else 4.0
"""Most pixels that the tiles cover, as a multiple of the map's: 14 x 14 pixels take tiles for 16 x 16."""
_IMAGES_FOR_ONEDNN = 16
"""With as many, torch gives a 1 x 1 convolution on one thread to oneDNN itself."""


class Convolution3x3(nn.Conv2d):
    """A 3 x 3 convolution of stride 1 with padding 1, made from a plain one whose parameters it uses.

    It runs in Winograd's form where that is faster: float32 on a CPU, many channels, large maps.
    """

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
        if not _is_plain(levels[0], self.weight):  # first: a graph must not depend on the sizes below
            return False
        tiles = sum(len(level) * num_tiles(level.shape[2], level.shape[3]) for level in levels)
        pixels = sum(len(level) * level.shape[2] * level.shape[3] for level in levels)
        return tiles >= LEAST_TILES and tiles * TILE**2 <= MOST_PADDED * pixels


class Convolution1x1(nn.Conv2d):
    """A 1 x 1 convolution of stride 1, made from a plain one whose parameters it uses.

    It is a matrix product where torch would not give it to oneDNN and MKL is slow: float32 on a CPU, with one thread
    and few images.
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__(plain.in_channels, plain.out_channels, 1, bias=False, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.train(plain.training)

    def forward(self, x: Float[Tensor, "images inputs height width"]) -> Float[Tensor, "images outputs height width"]:
        """The convolution of a map."""
        return convolve_1x1(x, self.weight, self.bias) if self._is_faster(x) else super().forward(x)

    def _is_faster(self, x: Tensor) -> bool:
        if not _is_plain(x, self.weight) or x.dim() != 4 or x.shape[1] != self.in_channels:
            return False
        return len(x) < _IMAGES_FOR_ONEDNN and x.numel() > 0 and torch.get_num_threads() == 1


class DilatedGroupConvolution(nn.Conv2d):
    """A dilated convolution in groups of channels, made from a plain one whose parameters it uses.

    With dilation d, pixels d apart never meet the pixels between them. So on a CPU the map is taken apart into d x d
    maps of every d-th pixel, which one convolution without dilation takes as images. oneDNN computes a dilated
    depthwise convolution several times as slowly, and in bfloat16 it reads uninitialised memory in the gradient of its
    weights (`tests/layers/test_convolution.py`).
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        kernel, dilation = plain.kernel_size, plain.dilation
        super().__init__(
            *(plain.in_channels, plain.out_channels, (kernel[0], kernel[1])),
            padding=(dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2)),
            dilation=(dilation[0], dilation[1]),
            groups=plain.groups,
            bias=False,
            device="meta",
        )
        self.weight, self.bias = plain.weight, plain.bias
        self.train(plain.training)

    def forward(self, x: Float[Tensor, "images inputs height width"]) -> Float[Tensor, "images outputs height width"]:
        """The convolution of a map."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        images, inputs, height, width = x.shape
        down, across = self.dilation
        rows, columns = -(-height // down), -(-width // across)
        x = F.pad(x, (0, columns * across - width, 0, rows * down - height)).permute(0, 2, 3, 1)
        x = x.reshape(images, rows, down, columns, across, inputs).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(images * down * across, rows, columns, inputs).permute(0, 3, 1, 2)
        padding = (self.kernel_size[0] // 2, self.kernel_size[1] // 2)
        y = F.conv2d(x, self.weight, self.bias, padding=padding, groups=self.groups).permute(0, 2, 3, 1)
        y = y.reshape(images, down, across, rows, columns, self.out_channels).permute(0, 3, 1, 4, 2, 5)
        y = y.reshape(images, rows * down, columns * across, self.out_channels)[:, :height, :width]
        return y.contiguous().permute(0, 3, 1, 2)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution is one of float32 on a CPU, outside a graph."""
    is_plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    is_in_graph = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return is_plain and not torch.is_autocast_enabled("cpu") and not is_in_graph


def convolved_levels(
    convolution: nn.Module, levels: Sequence[Float[Tensor, "images inputs _ _"]]
) -> list[Float[Tensor, "images outputs _ _"]]:
    """A convolution of every level of a pyramid, of all at once if the layer can."""
    if isinstance(convolution, Convolution3x3):
        return convolution.of_levels(levels)
    return [convolution(level) for level in levels]


def speed_up_convolutions(model: nn.Module) -> None:
    """Replace the convolutions of a model that have a faster form on a CPU; parameters stay the same objects."""
    new = {old: layer for old in model.modules() if (layer := _faster(old)) is not None}
    for module in list(model.modules()):
        for name, child in module._modules.items():  # named_children lists a layer that is used twice only once
            if child in new:
                module.register_module(name, new[child])


def _faster(module: nn.Module) -> nn.Conv2d | None:
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros" or module.stride != (1, 1):
        return None
    if module.groups > 1 and module.dilation != (1, 1) and _keeps_size(module):
        return DilatedGroupConvolution(module)
    if (module.kernel_size, module.padding, module.groups) == ((1, 1), (0, 0), 1) and onednn_is_faster():
        return Convolution1x1(module)
    if (module.kernel_size, module.padding, module.dilation, module.groups) != ((3, 3), (1, 1), (1, 1), 1):
        return None
    return Convolution3x3(module) if min(module.in_channels, module.out_channels) >= LEAST_CHANNELS else None


def _keeps_size(module: nn.Conv2d) -> bool:
    sides = zip(module.kernel_size, module.dilation, strict=True)
    return module.padding == tuple(dilation * (kernel // 2) for kernel, dilation in sides) and all(
        kernel % 2 == 1 for kernel in module.kernel_size
    )
