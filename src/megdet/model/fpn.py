"""The feature pyramid network (Lin et al., CVPR 2017): P2 to P6, or P3 to P7."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.layers.convert import NormFactory
from megdet.model.large_kernel import BoundaryRefinement, GlobalConvolution


class Fpn(nn.Module):
    """A top-down path with lateral connections, and coarser levels on top.

    Args:
        in_channels: channels of the backbone features used, the last of the backbone.
        channels: channels of every level.
        norm: makes the norm layer after each convolution of the path.
        has_norm: whether there are norm layers; the convolutions then have no bias.
        p6_from: the map from which a convolution of stride 2 makes P6 (and another makes P7 from P6, as in RetinaNet);
            without it P6 takes every second pixel of P5, and there is no P7.
        large_kernel: k of the global convolutions used as lateral connections, each followed by a boundary refinement;
            0 = 1 x 1 convolutions.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        norm: NormFactory,
        *,
        has_norm: bool,
        p6_from: Literal["c5", "p5"] | None = None,
        large_kernel: int = 0,
    ) -> None:
        super().__init__()
        self.p6_from = p6_from
        bias = not has_norm
        self.lateral = nn.ModuleList(_lateral(width, channels, large_kernel, norm, bias=bias) for width in in_channels)
        self.output = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=bias), norm(channels)) for _ in in_channels
        )
        if p6_from is not None:
            self.p6 = nn.Conv2d(in_channels[-1] if p6_from == "c5" else channels, channels, 3, 2)
            self.p7 = nn.Conv2d(channels, channels, 3, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: list[Float[Tensor, "images _ _ _"]]) -> list[Float[Tensor, "images channels _ _"]]:
        """P2 to P6 from C2 to C5, or P3 to P7 from C3 to C5; finer features are ignored."""
        features = features[-len(self.lateral) :]
        merged = self.lateral[-1](features[-1])
        pyramid = [self.output[-1](merged)]
        for level in range(len(features) - 2, -1, -1):
            lateral = self.lateral[level](features[level])
            merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            pyramid.insert(0, self.output[level](merged))
        if self.p6_from is None:
            return [*pyramid, pyramid[-1][:, :, ::2, ::2]]
        p6 = self.p6(with_border(features[-1] if self.p6_from == "c5" else pyramid[-1]))
        return [*pyramid, p6, self.p7(with_border(F.relu(p6)))]


def _lateral(width: int, channels: int, large_kernel: int, norm: NormFactory, *, bias: bool) -> nn.Sequential:
    if not large_kernel:
        return nn.Sequential(nn.Conv2d(width, channels, 1, bias=bias), norm(channels))
    convolution = GlobalConvolution(width, channels, channels, large_kernel, bias=bias)
    return nn.Sequential(convolution, norm(channels), BoundaryRefinement(channels, norm, bias=bias))


def with_border(features: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images channels _ _"]:
    """`features` with a border of one zero pixel, for a convolution of stride 2 without padding.

    With padding in the convolution, oneDNN reads uninitialised memory in the weight gradient of a bfloat16 map that is
    one pixel wide.
    """
    return F.pad(features, (1, 1, 1, 1))
