"""Bounds of a number, in the type of its field: `samples: AtLeastOne = 256`."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints


@dataclass(frozen=True)
class Bound:
    """The smallest and largest value of a number, and the words of the message."""

    least: float
    most: float
    words: str


_AT_LEAST_ONE = Bound(1.0, float("inf"), "it must be at least 1")
_NOT_NEGATIVE = Bound(0.0, float("inf"), "it must not be negative")

AtLeastOne = Annotated[int, _AT_LEAST_ONE]
NotNegative = Annotated[int, _NOT_NEGATIVE]
NotNegativeNumber = Annotated[float, _NOT_NEGATIVE]
Fraction = Annotated[float, Bound(0.0, 1.0, "it must lie between 0 and 1")]


def faults_of(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, why) of every wrong value in a dataclass and in the dataclasses inside it.

    Checks the bounds of numbers, and takes the keys that the `faults()` of a dataclass names.
    """
    for name, hint in get_type_hints(type(value), include_extras=True).items():
        own = getattr(value, name)
        if dataclasses.is_dataclass(own):
            yield from faults_of(own, f"{prefix}{name}.")
            continue
        bounds = (part for kind in (hint, *get_args(hint)) for part in getattr(kind, "__metadata__", ()))
        yield from (
            (prefix + name, bound.words)
            for bound in bounds
            if isinstance(bound, Bound) and own is not None and not bound.least <= own <= bound.most
        )
    if hasattr(value, "faults"):
        yield from ((prefix + key, why) for key, why in value.faults())
