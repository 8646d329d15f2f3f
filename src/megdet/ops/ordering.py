"""Total orders: hashes that replace random generators, and sort keys in which no two candidates are equal.

A choice that depends on a generator's state, or on the position of a candidate in some list, changes when the images
are spread over devices in another way. Here a choice depends only on 64-bit keys: a hash of (image seed, identity of
the candidate), or a score combined with the candidate's index.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megdet.ops.integer_hash import GOLDEN, MIX_1, MIX_2

NEVER = torch.iinfo(torch.int64).min
"""The key of a candidate that must not be chosen."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of a signed tensor."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash64(seeds: Int64[Tensor, " *shape"], index: Int64[Tensor, " *shape2"]) -> Int64[Tensor, " *shape3"]:
    """Pseudo-random 64-bit numbers of (seed, index), the finaliser of SplitMix64; `seeds` and `index` broadcast.

    For one seed the map from index to number is a bijection: different candidates never get equal keys.
    """
    x = seeds + index * GOLDEN
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def score_keys(scores: Float[Tensor, "... candidates"]) -> Int64[Tensor, "... candidates"]:
    """Keys that order candidates by score, ties to the lower index in the last dimension.

    The upper half is the float32 score as an order-preserving integer, the lower half the index counted down. Indices
    must be below 2**32. NaN scores get the key NEVER.
    """
    bits = scores.float().view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    place = torch.arange(scores.shape[-1], device=scores.device)
    keys = (ordered << 32) + (0xFFFFFFFF - place)
    return keys.masked_fill_(scores.isnan(), NEVER)


def top(
    keys: Int64[Tensor, "... candidates"], count: int
) -> tuple[Int64[Tensor, "... kept"], Int64[Tensor, "... kept"]]:
    """The `count` largest keys (fewer if there are fewer candidates) in falling order, and their indices."""
    values, places = keys.topk(min(count, keys.shape[-1]), dim=-1, sorted=True)
    return values, places
