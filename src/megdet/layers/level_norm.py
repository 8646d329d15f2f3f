"""One norm layer for all levels of a pyramid, whose batch statistics are those of all of them together."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.layers.batch_norm import CrossDeviceBatchNorm


def normalized_levels(
    norm: nn.Module, levels: list[Float[Tensor, "images channels _ _"]]
) -> list[Float[Tensor, "images channels _ _"]]:
    """The levels, normalised and cut at 0 (ReLU). What is given is overwritten where the norm layer does nothing.

    Batch statistics are those of all levels together: a pair for each level would not fit the one running pair.
    """
    if not (isinstance(norm, CrossDeviceBatchNorm) and norm.training):
        return [F.relu_(norm(level)) for level in levels]
    # a row a pixel, so that maps in channels-last memory are copied once and need not be turned
    joined = torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in levels], 1)
    joined = F.relu(norm(joined.transpose(1, 2).unsqueeze(3)))
    parts = torch.split(joined, [level.shape[2] * level.shape[3] for level in levels], 2)
    return [part.reshape(level.shape) for part, level in zip(parts, levels, strict=True)]
