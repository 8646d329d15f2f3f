"""Random numbers as hashes of Python integers; `ops/ordering.py` has the same for tensors."""

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def hash_integers(*numbers: int) -> int:
    """One signed 64-bit hash of some integers, the chain of `ordering.hash64`: the finaliser of SplitMix64."""
    state = 0
    for number in numbers:
        x = (state + (number & _MASK) * (GOLDEN & _MASK)) & _MASK
        x = ((x ^ (x >> 30)) * (MIX_1 & _MASK)) & _MASK
        x = ((x ^ (x >> 27)) * (MIX_2 & _MASK)) & _MASK
        state = x ^ (x >> 31)
    return state - (1 << 64) if state >> 63 else state
