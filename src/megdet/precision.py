"""The arithmetic of a forward and its backward: the one place that knows what a recipe's `precision` does.

    precision   weights and sums   convolutions and matrix products
    float32     float32            float32
    tf32        float32            TF32 on a GPU that has it, otherwise float32
    bfloat16    float32            bfloat16, by autocast
    float64     float64            float64

All settings end with their `with` block, so detectors of several precisions can take turns in one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of weights, and of what is summed over images."""
    return torch.float64 if precision == "float64" else torch.float32


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """A context in which a forward on this device computes in this precision; `backward` is for its gradients."""
    with tf32_flags(precision), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        yield


@contextmanager
def arithmetic_of_image(precision: str, device: torch.device) -> Iterator[None]:
    """The same in a thread that computes one image, while `arithmetic` is entered around all such threads.

    A weight is cast anew for every use. Kept casts would be dropped whenever another thread leaves its block, and what
    several uses of a weight give its gradient would add up in bfloat16 or in float32, as it happens.
    """
    enabled = precision == "bfloat16"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False):
        yield


def backward(loss: Tensor, precision: str) -> None:
    """`loss.backward()` in the arithmetic of the forward: the call belongs after the block of `arithmetic`.

    Autocast is off in it, as torch advises: a gradient is computed in the dtype of its forward.
    """
    with tf32_flags(precision):
        loss.backward()  # type: ignore[no-untyped-call]  # torch's, which has no types


@contextmanager
def tf32_flags(precision: str) -> Iterator[None]:
    """Let float32 convolutions and matrix products of a GPU use TF32 or not; torch's default is only convolutions.

    The flags are the process's: around threads that each enter `arithmetic`, so that the last to leave restores them.
    """
    # not by torch's newer names for it (fp32_precision): reading the flags below, as torch.compile does, then fails
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before
