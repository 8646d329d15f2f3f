"""Small tensors of fixed numbers, made once a device: making one on a GPU makes the host wait."""

from functools import lru_cache

import torch
from torch import Tensor

Numbers = tuple[int | float, ...] | tuple[tuple[int | float, ...], ...]


@lru_cache(maxsize=256)
def constant(numbers: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of these numbers; it is shared, so it must not be changed in place."""
    with torch.inference_mode(False):  # training must be able to use what an evaluation made first
        return torch.tensor(numbers, dtype=dtype).to(device)
