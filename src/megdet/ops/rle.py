"""Masks as COCO writes them: lengths of runs, column by column, in turn of pixels outside and inside of an object.

hotcoco packs and unpacks the text that stands for these numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hotcoco import mask as coco_masks
from jaxtyping import Bool, Int64

from megdet.ops.masks import PastedMask

Rle = dict[str, Any]
"""`size`: height and width of the image in pixels; `counts`: the packed lengths, or a list of them."""


def encode_mask(mask: PastedMask | None, size: tuple[int, int]) -> Rle:
    """The run lengths of an object's mask in an image of this height and width; None is a mask without a pixel.

    Only the columns of the object are looked at.
    """
    height, width = size
    edges = np.zeros(0, np.int64)
    if mask is not None:
        columns = np.zeros((mask.pixels.shape[1], height), np.bool_)
        columns[:, mask.y : mask.y + mask.pixels.shape[0]] = mask.pixels.numpy().T
        edges = np.flatnonzero(np.diff(columns.ravel(), prepend=False, append=False)) + mask.x * height
    ends = np.append(edges[edges < height * width], height * width)
    lengths = np.diff(ends, prepend=0)
    packed = coco_masks.frPyObjects({"size": [height, width], "counts": lengths.tolist()}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode()}


def decode_mask(rle: Rle) -> Bool[np.ndarray, "height width"]:
    """Which pixels of the image are inside; the inverse of `encode_mask`."""
    return coco_masks.decode(rle).astype(np.bool_)


def packed_pixels(texts: Sequence[str]) -> Int64[np.ndarray, " texts"]:
    """How many pixels each packed `counts` is about, -1 for a text that is none: readers take a wrong number silently.

    A length is written as its difference from the one before the last, in digits of 5 bits, the lowest first; a sixth
    bit says that another digit follows, and the digits of a negative number end with the fifth bit set.
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
    used = np.where(index == 0, 1, (count[row] - index + 1) // 2)  # in so many lengths: every second from there on
    pixels = np.zeros(len(sound), np.int64)
    np.add.at(pixels, row, numbers * used)
    pixels[np.repeat(np.arange(len(sound)), sizes)[is_broken]] = -1
    pixels[sizes == 0] = -1
    return pixels
