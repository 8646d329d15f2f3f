"""Small constant tensors, made once for each device: creating one on a GPU makes the host wait."""

from functools import lru_cache

import torch
from torch import Tensor

Numbers = tuple[int | float, ...] | tuple[tuple[int | float, ...], ...]


def constant(numbers: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of these numbers; it is shared, so it must not be changed in place."""
    if torch.compiler.is_exporting():  # then the tensor is part of the graph and must not be cached
        return torch.tensor(numbers, dtype=dtype, device=device)
    return _made(numbers, dtype, device, stream_of(device))


def stream_of(device: torch.device) -> int:
    """The current stream of a device, part of the key of every cached tensor.

    A tensor made on one stream may be read on another only after waiting for it.
    """
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


@lru_cache(maxsize=4096)  # a canvas has about ten of its own, and a plan may have hundreds of canvases
def _made(numbers: Numbers, dtype: torch.dtype, device: torch.device, _stream: int) -> Tensor:
    with torch.inference_mode(False):  # so that training can use a tensor that an evaluation made
        tensor = torch.tensor(numbers, dtype=dtype)
        # page-locked, since the host waits for a copy from pageable memory
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
