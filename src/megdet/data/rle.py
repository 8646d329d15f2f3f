"""Runs of pixels (RLE), as the COCO API has them: column by column, the first run outside the object.

In a file they are a list of lengths, or the compressed text of the COCO API.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hotcoco import mask as coco_masks
from jaxtyping import Bool, Int64
from numpy.typing import NDArray

_FIRST, _LAST = ord("0"), ord("o")
"""The characters of compressed runs: six bits each."""
_MOST_CHARACTERS = 7
"""Characters of one number at most: 35 bits, more than any image has pixels."""

Rle = dict[str, Any]
"""`size`: height and width of the image in pixels; `counts`: compressed text, or a list of lengths."""


def runs_of_text(text: str | bytes) -> NDArray[np.int64] | None:
    """The runs of a compressed text; None if the text is not valid.

    A character has five bits of a number and a bit that says whether more follow, lowest bits first. From the fourth
    number on, the number is the difference from the run two places before.
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
    """The mask of an object as pixels; the runs must add up to height x width."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def decode_mask(rle: Rle) -> Bool[np.ndarray, "height width"]:
    """The mask of an object as pixels of its whole image; the inverse of `encode_mask`."""
    return coco_masks.decode(rle).astype(np.bool_)


def encode_mask(pixels: Bool[np.ndarray, "rows columns"], x: int, y: int, size: tuple[int, int]) -> Rle:
    """The RLE of an object in an image of height and width `size`; `pixels` is a frame whose upper left pixel is x, y.

    Reads only the columns of the frame.
    """
    height, width = size
    columns = np.zeros((pixels.shape[1], height), np.bool_)
    columns[:, y : y + pixels.shape[0]] = pixels.T
    edges = np.flatnonzero(np.diff(columns.ravel(), prepend=False, append=False)) + x * height
    ends = np.append(edges[edges < height * width], height * width)
    lengths = np.diff(ends, prepend=0)
    packed = coco_masks.frPyObjects({"size": [height, width], "counts": lengths.tolist()}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode()}


def voted_mask(masks: Sequence[Rle], weights: Sequence[float]) -> Rle:
    """The pixels whose masks have at least half of the total weight; masks of one image with compressed `counts`.

    Reads only the ends of runs, not pixels. Raises ValueError if `counts` are not compressed runs.
    """
    ends, steps = [], []
    for mask, weight in zip(masks, weights, strict=True):
        runs = runs_of_text(mask["counts"])
        if runs is None:
            raise ValueError(f"no compressed runs: {mask['counts']}")
        ends.append(runs.cumsum()[:-1])  # the last run ends with the image
        steps.append(weight * (1.0 - 2.0 * (np.arange(len(runs) - 1) % 2)))
    height, width = masks[0]["size"]
    places = np.concatenate(ends)
    order = places.argsort(kind="stable")
    places, level = places[order], np.concatenate(steps)[order].cumsum()
    is_last = np.append(places[1:] != places[:-1], True)[: len(places)]
    places, level = places[is_last], level[is_last]
    half = (0.5 - 1e-9) * sum(weights)  # equal to half up to rounding counts as half
    is_inside = level >= half
    turns = np.flatnonzero(np.diff(is_inside, prepend=False))
    runs = np.diff(places[turns], prepend=0, append=height * width)
    packed = coco_masks.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode()}


def packed_pixels(texts: Sequence[str]) -> Int64[np.ndarray, " texts"]:
    """How many pixels each compressed `counts` covers, -1 for an invalid text; the COCO API does not check the sum.

    A length is written as the difference from the length two places before, in digits of 5 bits, lowest first. A sixth
    bit says that another digit follows; the last digit of a negative number has its fifth bit set.
    """
    sound = [text if text.isascii() else "" for text in texts]
    sizes = np.array([len(text) for text in sound], np.int64)
    digits = np.frombuffer("".join(sound).encode(), np.uint8).astype(np.int64) - 48
    row = np.repeat(np.arange(len(sound)), sizes)
    follows = (digits & 32) != 0
    ends_text = np.diff(row, append=-1) != 0
    last = np.flatnonzero(~follows | ends_text)
    first = np.append(0, last[:-1] + 1)[: len(last)]
    place = np.arange(len(digits)) - np.repeat(first, last - first + 1)
    is_broken = (digits < 0) | (digits > 63) | (follows & ends_text) | (place > 6)

    place = np.minimum(place, 6)
    numbers = np.add.reduceat((digits & 31) << (5 * place), first) if len(first) else first
    numbers -= np.where(digits[last] & 16, 32 << (5 * place[last]), 0)
    row = row[last]
    count = np.bincount(row, minlength=len(sound))
    index = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    used = np.where(index == 0, 1, (count[row] - index + 1) // 2)  # lengths that it adds to: every second from there on
    pixels = np.zeros(len(sound), np.int64)
    np.add.at(pixels, row, numbers * used)
    pixels[np.repeat(np.arange(len(sound)), sizes)[is_broken]] = -1
    pixels[sizes == 0] = -1
    return pixels
