"""What the machine is good at, asked in one place."""

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_SECONDS = 0.25
"""The time that is given to measuring; each operation runs at least once."""
_SLOW = 0.75
"""Of float32's speed, below which bfloat16 is slow: far enough that two measurements of a machine agree."""
_FORMATS = (torch.float32, torch.bfloat16)
_CHANNELS, _EDGE, _SIDE = 128, 36, 512


class Speeds(NamedTuple):
    """Operations a second (multiplications and additions) of convolutions and matrix products."""

    float32: float
    bfloat16: float

    @property
    def faster(self) -> str:
        """The faster one as a recipe names its precision."""
        return "bfloat16" if self.bfloat16 > self.float32 else "float32"

    @property
    def bfloat16_is_slow(self) -> bool:
        """Whether bfloat16 is clearly behind, as on processors that have no unit for it or half of one."""
        return self.bfloat16 < _SLOW * self.float32

    def __str__(self) -> str:
        return f"{_digits(self.float32)} GFLOP/s in float32, {_digits(self.bfloat16)} in bfloat16"


@cache
def measure_speeds(device: torch.device) -> Speeds:
    """Time a convolution and a matrix product in both formats, in turn, for a quarter of a second; the best counts.

    What a processor's flags say of bfloat16 is not what it does: with AVX-512 BF16 alone it is half as fast as float32.
    """
    images = 1 if device.type == "cpu" else 64  # enough for a GPU to be busy
    with torch.inference_mode():
        operations = [(dtype, run) for dtype in _FORMATS for run in _operations(images, dtype, device)]
        for _, run in operations:
            run()  # the first one chooses its kernel
        best = [float("inf")] * len(operations)
        ends = time.perf_counter() + _SECONDS
        is_over = False
        while not is_over:
            best = [min(known, _seconds(run, device)) for known, (_, run) in zip(best, operations, strict=True)]
            is_over = time.perf_counter() >= ends
    work = images * 2.0 * (_EDGE**2 * _CHANNELS**2 * 9 + _SIDE**3)
    seconds = [sum(s for s, (own, _) in zip(best, operations, strict=True) if own == dtype) for dtype in _FORMATS]
    return Speeds(*(work / own for own in seconds))


def slow_at(precision: str, device: torch.device) -> str:
    """The two figures where a recipe's precision is bfloat16 and the device is slow at it, otherwise nothing."""
    if precision != "bfloat16" or not (speeds := measure_speeds(device)).bfloat16_is_slow:
        return ""
    return str(speeds)


def _operations(images: int, dtype: torch.dtype, device: torch.device) -> list[Callable[[], Tensor]]:
    """A convolution and a matrix product like those of a detector."""
    pixels = torch.ones(images, _CHANNELS, _EDGE, _EDGE, dtype=dtype, device=device)
    pixels = pixels.to(memory_format=torch.channels_last)
    kernel = torch.ones(_CHANNELS, _CHANNELS, 3, 3, dtype=dtype, device=device)
    kernel = kernel.to(memory_format=torch.channels_last)
    rows = torch.ones(images * _SIDE, _SIDE, dtype=dtype, device=device)
    weights = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    return [lambda: F.conv2d(pixels, kernel, padding=1), lambda: F.linear(rows, weights)]


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """How long an operation takes once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _digits(speed: float) -> str:
    giga = speed / 1e9
    return f"{giga:.0f}" if giga >= 10 else f"{giga:.2g}"
