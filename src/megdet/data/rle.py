"""Runs of pixels (RLE), as the COCO API has them: column by column, the first run outside the object.

In a file they are a list of lengths, or the compressed text of the COCO API.
"""

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

_FIRST, _LAST = ord("0"), ord("o")
"""The characters of compressed runs: six bits each."""
_MOST_CHARACTERS = 7
"""Of one number: 35 bits, more than any image has pixels."""


def runs_of_text(text: str | bytes) -> NDArray[np.int64] | None:
    """The runs of a compressed text, or None where it is none.

    A character has five bits of a number and one that says whether more follow, the lowest bits first; from the
    fourth number on it is the difference from the number before the last.
    """
    codes = np.frombuffer(text if isinstance(text, bytes) else text.encode("utf-8", "replace"), np.uint8)
    if not len(codes):
        return np.zeros(0, np.int64)
    if codes.min() < _FIRST or codes.max() > _LAST:
        return None
    bits = codes.astype(np.int64) - _FIRST
    ends = np.flatnonzero(bits & 32 == 0)
    if not len(ends) or ends[-1] != len(bits) - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends + 1 - starts
    if lengths.max() > _MOST_CHARACTERS:
        return None
    place = np.arange(len(bits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((bits & 31) << (5 * place), starts)
    runs -= (bits[ends] & 16 > 0).astype(np.int64) << (5 * lengths)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs if runs.min() >= 0 else None


def pixels_of_runs(runs: NDArray[np.integer], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """Which pixels are the object's; the runs must add up to the size."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
