"""What is told of a file that computes with 8-bit integers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a file takes on the machine that exported it."""

    bytes: int
    seconds: float
    """of the processor for an image alone in its batch, the median of some images"""


@dataclass(frozen=True)
class Quantized:
    """How a file came to compute with 8-bit integers, and what that saves."""

    method: str
    """how the ranges of numbers follow from what was seen"""
    images: int
    """of the training set, on which they were seen"""
    layers: int
    """which compute with integers; one that serves several levels counts at each"""
    float_layers: int
    """which predict, and stay in float32"""
    timed: int
    """images on which the files were timed"""
    before: Cost
    """of the file in float32"""
    after: Cost
