"""The feature pyramid network (Lin et al., CVPR 2017): P2 to P6."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.layers.convert import NormFactory


class Fpn(nn.Module):
    """A top-down path with lateral connections; P6 takes every second pixel of P5."""

    def __init__(self, in_channels: Sequence[int], channels: int, norm: NormFactory, *, has_norm: bool) -> None:
        super().__init__()
        bias = not has_norm
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, 1, bias=bias), norm(channels)) for width in in_channels
        )
        self.output = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=bias), norm(channels)) for _ in in_channels
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: list[Float[Tensor, "images _ _ _"]]) -> list[Float[Tensor, "images channels _ _"]]:
        """P2, P3, P4, P5 and P6 of C2, C3, C4 and C5."""
        merged = self.lateral[-1](features[-1])
        pyramid = [self.output[-1](merged)]
        for level in range(len(features) - 2, -1, -1):
            lateral = self.lateral[level](features[level])
            merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            pyramid.insert(0, self.output[level](merged))
        return [*pyramid, pyramid[-1][:, :, ::2, ::2]]
