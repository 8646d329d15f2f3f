"""Convolutions with large kernels in separable form (Peng et al., "Large Kernel Matters", CVPR 2017)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.layers.convert import NormFactory


class GlobalConvolution(nn.Module):
    """A k x k convolution in two branches: k x 1 then 1 x k beside 1 x k then k x 1, summed (Sec. 3.1, Figure 3 B).

    There is no activation between the steps, so the layer is linear; its weights grow with k, not with its square.

    Args:
        in_channels: channels of the input.
        hidden: channels between the two steps: `out_channels` in the paper, a separate number in Light-Head R-CNN.
        out_channels: channels of the output.
        size: k, an odd number; the map keeps its height and width.
        bias: whether the convolutions have a bias.
    """

    def __init__(self, in_channels: int, hidden: int, out_channels: int, size: int, *, bias: bool) -> None:
        super().__init__()
        self.tall_first, self.wide_first = (
            nn.Sequential(
                nn.Conv2d(in_channels, hidden, first, padding=(first[0] // 2, first[1] // 2), bias=bias),
                nn.Conv2d(hidden, out_channels, second, padding=(second[0] // 2, second[1] // 2), bias=bias),
            )
            for first, second in (((size, 1), (1, size)), ((1, size), (size, 1)))
        )

    def forward(self, x: Float[Tensor, "images _ height width"]) -> Float[Tensor, "images _ height width"]:
        """The sum of the two branches."""
        summed: Tensor = self.tall_first(x) + self.wide_first(x)
        return summed


class BoundaryRefinement(nn.Module):
    """A residual block of two 3 x 3 convolutions with a ReLU between them (Sec. 3.2, Figure 2 C)."""

    def __init__(self, channels: int, norm: NormFactory, *, bias: bool) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=bias), norm(channels)) for _ in range(2)
        )

    def forward(self, x: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images channels _ _"]:
        """The refined map."""
        refined: Tensor = x + self.second(F.relu(self.first(x)))
        return refined
