"""Sums of numbers in fixed point: integers, whose sum is the same in whatever order and on whatever devices they meet.

A number is rounded to a multiple of a step, a power of two, and added as a 64-bit integer. What does not fit is not
added wrongly: it is counted, and the sum of a place that counts such a number is NaN.

With steps of 2^-40 a number may be up to 2^10, and the sum of `recipe.MOST_EXACT_IMAGES` such numbers stays below 2^62,
so no sum can wrap. Rounding errs by at most 2^-41 a number. A sum in float32 errs by about 2^-25 of its largest partial
sum, which is more where that is above 2^-16.
"""

import struct

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

GRADIENT_BITS = 40
"""Gradients of one image's loss are rounded to multiples of 2^-40 and may be up to 1,024 in every place."""
LOSS_BITS = 30
"""Losses and counts of one image are rounded to multiples of 2^-30 and may be up to a million."""
_LIMIT = 2.0**50
"""of a number, in steps"""
_SHIFT = 1.5 * 2.0**52
"""In steps: added to a float64 it leaves the nearest number of steps in the lowest bits."""
_CHUNK = 1 << 15
"""Numbers worked on together, which stay in a processor's cache."""


def add_numbers(
    total: Int64[Tensor, " numbers"], values: Float[Tensor, " numbers"], bits: int, *, begins: bool = False
) -> Bool[Tensor, ""]:
    """Add numbers to sums in steps of 2^-bits, in place; returns whether all of them fit.

    A sum to which a number was added that does not fit means nothing from then on. With `begins` the sums have no
    values yet, and get these numbers.
    """
    if not len(values):
        return torch.ones((), dtype=torch.bool, device=values.device)
    lowest, highest = torch.aminmax(values)  # a norm of order infinity takes six times as long
    limit = _LIMIT * 2.0**-bits
    fits: Tensor = (lowest > -limit) & (highest < limit)
    chunk = min(_CHUNK, len(values)) if values.device.type == "cpu" else len(values)
    room = torch.empty(chunk, dtype=torch.float64, device=values.device)
    shift = _SHIFT * 2.0**-bits
    bits_of_shift = struct.unpack("<q", struct.pack("<d", shift))[0]
    for own, numbers in zip(torch.split(total, chunk), torch.split(values, chunk), strict=True):
        shifted = room[: len(numbers)].copy_(numbers).add_(shift)
        if begins:
            torch.sub(shifted.view(torch.int64), bits_of_shift, out=own)
        else:
            own.add_(shifted.view(torch.int64).sub_(bits_of_shift))
    return fits


def fixed_numbers(values: Float[Tensor, " numbers"], bits: int) -> Int64[Tensor, "2 numbers"]:
    """Numbers in steps of 2^-bits, and for each whether it does not fit: both may be added up."""
    scaled = values.double() * 2.0**bits
    fits = scaled.abs() < _LIMIT
    return torch.stack([torch.where(fits, scaled, 0.0).round().to(torch.int64), (~fits).to(torch.int64)])


def summed_numbers(sums: Int64[Tensor, "2 numbers"], bits: int) -> Float[Tensor, " numbers"]:
    """The sums of what `fixed_numbers` gave, in float64; NaN where a number did not fit."""
    return (sums[0].double() * 2.0**-bits).masked_fill(sums[1] > 0, torch.nan)
