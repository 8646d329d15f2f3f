"""The work and memory of the paper's detector, counted from its modules (`counting.py`) and kept as a small table.

With the table a simulation needs no torch. A test counts again.
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import msgspec

from megdet.planning.step import Exchange

FILE = "counts.json"
TILE = 64
"""Edge in pixels of the canvas that is counted: the largest stride, so other canvases are multiples of it."""
Variant = Literal["trained", "frozen"]
"""trained = batch norm; frozen = frozen statistics and two frozen stages, as in our recipes of BN size 0."""


@dataclass(frozen=True)
class Counts:
    """For one tile of an image, unless a field says otherwise; a FLOP is a multiplication or an addition.

    Convolutions and matrix products count; RoIAlign, NMS and losses do not.
    """

    backbone: int
    """FLOPs of the forward"""
    pyramid: int
    """FLOPs of the forward"""
    rpn: int
    """FLOPs of the forward; a backward from every anchor has twice as many"""
    backward: int
    """FLOPs of the backward through pyramid and backbone"""
    box_head: int
    """FLOPs of an image's forward; the backward has twice as many"""
    normed: int
    """values that pass through norm layers in the forward"""
    normed_backward: int
    """values whose gradient passes back through them"""
    kept: int
    """values that the forward keeps for the backward

    This rests on an assumption: two for each value that passes through a norm layer (the inputs of the norm layer and
    of the next convolution), and three for each place and channel of the pyramid (the inputs of its 3 x 3 convolutions,
    of the RPN's, and of the RPN's outputs). A frozen stage keeps only its output, for the pyramid. Targets, RoIs and
    the box head are small in comparison.
    """
    exchange: Exchange
    """what a step sends, for any number of images"""


@cache
def detector_counts(variant: Variant) -> Counts:
    """The counts of ResNet-50 FPN with 80 classes (Sec. 4)."""
    content = (resources.files("megdet.planning") / FILE).read_bytes()
    return msgspec.json.decode(content, type=dict[Variant, Counts])[variant]
