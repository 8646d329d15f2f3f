"""One norm layer for all levels of a pyramid, with batch statistics over all levels together."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.layers.batch_norm import CrossDeviceBatchNorm


def normalized_levels(
    norm: nn.Module, levels: list[Float[Tensor, "images channels _ _"]]
) -> list[Float[Tensor, "images channels _ _"]]:
    """The levels after norm and ReLU. The input is overwritten if the norm layer does nothing.

    Batch statistics are those of all levels together, since the layer has one pair of running statistics.
    """
    if not (isinstance(norm, CrossDeviceBatchNorm) and norm.training):
        return [F.relu_(norm(level)) for level in levels]
    # one row a pixel, so that maps in channels-last memory are copied once and not permuted
    joined = torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in levels], 1)
    joined = F.relu(norm(joined.transpose(1, 2).unsqueeze(3)))
    parts = torch.split(joined, [level.shape[2] * level.shape[3] for level in levels], 2)
    return [part.reshape(level.shape) for part, level in zip(parts, levels, strict=True)]
