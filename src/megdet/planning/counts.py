"""What the paper's detector asks of a device: counted from its modules (`counting.py`), kept as a small table.

So that a simulation needs no torch. A test counts again.
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import msgspec

from megdet.planning.step import Exchange

FILE = "counts.json"
TILE = 64
"""Edge in pixels of the canvas that is counted: the largest stride, so that other canvases are multiples of it."""
Variant = Literal["trained", "frozen"]
"""With batch norm, or with fixed statistics and the first two stages frozen, as our recipes of BN size 0 have it."""


@dataclass(frozen=True)
class Counts:
    """Of one tile of an image, where nothing else is said; a FLOP is a multiplication or an addition.

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
    """values that the forward keeps for the backward.

    An assumption, counted: two for each value that passes through a norm layer (what the norm layer and what the next
    convolution read), and three on each place and channel of the pyramid (the inputs of its 3 x 3 convolutions, of the
    RPN's, and of the RPN's outputs). Of a frozen stage only what leaves it is kept, for the pyramid. Targets, RoIs and
    the box head are small beside them.
    """
    exchange: Exchange
    """of a step of any number of images"""


@cache
def detector_counts(variant: Variant) -> Counts:
    """The counts of ResNet-50 FPN with 80 classes (Sec. 4)."""
    content = (resources.files("megdet.planning") / FILE).read_bytes()
    return msgspec.json.decode(content, type=dict[Variant, Counts])[variant]
