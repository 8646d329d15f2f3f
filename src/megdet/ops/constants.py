"""Small tensors of fixed numbers, made once a device: made the plain way on a GPU, each would make the host wait."""

from functools import lru_cache

import torch
from torch import Tensor

Numbers = tuple[int | float, ...] | tuple[tuple[int | float, ...], ...]


def constant(numbers: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of these numbers; it is shared, so it must not be changed in place."""
    if torch.compiler.is_exporting():  # what is made then is a part of the graph and has no numbers to keep
        return torch.tensor(numbers, dtype=dtype, device=device)
    return _made(numbers, dtype, device, stream_of(device))


def stream_of(device: torch.device) -> int:
    """The stream on which work for a device is queued now; part of the key of every tensor kept from call to call.

    A tensor made on one stream may be read on another only after waiting for it.
    """
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


@lru_cache(maxsize=4096)  # a canvas has about ten of its own, and a plan may have hundreds of canvases
def _made(numbers: Numbers, dtype: torch.dtype, device: torch.device, _stream: int) -> Tensor:
    with torch.inference_mode(False):  # so that training can use a tensor that an evaluation made
        tensor = torch.tensor(numbers, dtype=dtype)
        # the host waits for a copy out of pageable memory
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
