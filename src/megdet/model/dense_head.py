"""The towers of a one-stage detector: the same convolutions on every level, a prediction for every anchor."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megdet.layers.convert import NormFactory
from megdet.layers.convolution import convolved_levels
from megdet.layers.level_norm import normalized_levels


class Tower(nn.Module):
    """3 x 3 convolutions, shared by all levels; the last predicts `outputs` numbers for each anchor of a cell.

    Args:
        channels: channels of every level and convolution.
        convolutions: number of convolutions before the last.
        anchors_per_cell: anchors of a cell; their outputs are neighbouring channels.
        outputs: numbers predicted for an anchor.
        norm: makes the norm layer after each convolution but the last.
        has_norm: whether there are norm layers; convolutions before them then have no bias.
    """

    def __init__(
        self,
        channels: int,
        convolutions: int,
        anchors_per_cell: int,
        outputs: int,
        norm: NormFactory,
        *,
        has_norm: bool,
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=not has_norm) for _ in range(convolutions)
        )
        self.norms = nn.ModuleList(norm(channels) for _ in range(convolutions))
        self.predict = nn.Conv2d(channels, anchors_per_cell * outputs, 3, padding=1)
        for layer in (*self.convolutions, self.predict):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self, pyramid: Sequence[Float[Tensor, "images channels _ _"]]
    ) -> list[Float[Tensor, "images _ outputs"]]:
        """The outputs of every anchor of each level, ordered as the anchors are."""
        levels = list(pyramid)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            levels = normalized_levels(norm, convolved_levels(convolution, levels))
        predicted = convolved_levels(self.predict, levels)
        return [torch.unflatten(level.permute(0, 2, 3, 1).flatten(1), 1, (-1, self.outputs)) for level in predicted]
