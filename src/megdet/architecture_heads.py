"""The second stage of detectors in a recipe: sections of `recipe.model` for heads on RoIs, a dataclass each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megdet.architecture_parts import BoxLossKind, NormKind
from megdet.bounds import AtLeastOne, Fraction, NotNegative, NotNegativeNumber

REGIONS = ("left", "right", "upper", "lower", "center", "enlarged")
"""The regions that `box_head.regions` may name; `model/regions.py` has their coordinates."""
INCEPTION_BRANCHES = 4
"""Branches of an inception block, each with an equal part of its channels."""


@dataclass(frozen=True)
class RoiHead:
    """Keys of every second-stage head: the RoIs of its loss, and which detections it keeps."""

    samples: AtLeastOne = 512
    """RoIs an image in the loss"""
    sampling: Literal["random", "hard"] = "random"
    """how the RoIs of the loss are chosen: at random, or those of greatest loss (online hard example mining)"""
    hard_nms_iou: Fraction = 1.0
    """with sampling hard: a RoI with a larger IoU with a harder RoI is left out; 0.7 in the paper, 1 = none"""
    positive_fraction: Fraction = 0.25
    """largest part of positives among randomly drawn samples; hard samples have no such limit"""
    positive_iou: Fraction = 0.5
    """a RoI of at least this overlap with a box is positive, any other negative"""
    box_loss: BoxLossKind = "smooth_l1"
    """smooth_l1 of the regression targets, or giou = 1 - the generalised IoU of the boxes themselves"""
    smooth_l1_beta: NotNegativeNumber = 1 / 9
    """the error at which smooth_l1 turns from square to linear, in units of the regression targets"""
    score_threshold: Fraction = 0.05
    """detections below this score are dropped"""
    nms_iou: Fraction = 0.5
    """detections of one class that overlap more are suppressed"""
    detections: AtLeastOne = 100
    """detections an image"""
    test_iterations: NotNegative = 0
    """while testing: how often the second stage runs again on its own detections"""
    vote_iou: Fraction = 0.0
    """while testing: boxes of one class with at least this IoU with a detection vote for its box; 0 = no vote"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        if self.hard_nms_iou < 1 and self.sampling != "hard":
            yield "hard_nms_iou", f"sampling is {self.sampling}, so nothing would use it: set sampling hard, or this 1"


@dataclass(frozen=True)
class BoxHead(RoiHead):
    """The second stage: RoIAlign, convolutions if asked for, fully connected layers, classes and boxes."""

    convolutions: NotNegative = 0
    """3 x 3 convolutions on the pooled features before the fully connected layers (NoC)"""
    convolution_channels: AtLeastOne = 256
    """their channels"""
    block: Literal["convolution", "inception"] = "convolution"
    """what each of these convolutions is: one convolution, or an inception block of four branches"""
    maxout: bool = False
    """pool from the two levels nearest to the RoI's size and take the maximum, after the first convolution if any"""
    regions: tuple[str, ...] = ()
    """regions pooled besides the RoI: left, right, upper and lower half, center (half as large), enlarged (by 1.8)"""
    global_context: bool = False
    """also pool the whole image"""
    layers: AtLeastOne = 2
    """fully connected layers"""
    channels: AtLeastOne = 1024
    """width of the fully connected layers"""
    norm: NormKind = "none"
    """norm layer after each convolution or, without any, each fully connected layer; batch needs bn_size > 0"""
    pool_size: AtLeastOne = 7
    """bins along each edge of a pooled RoI"""
    sampling_ratio: NotNegative = 2
    """sampling points of a bin along each edge; 0 = one for each pixel that it spans, for which a GPU waits"""
    aligned: bool = True
    """shift coordinates by half a pixel, the correct form of RoIAlign; false gives torchvision's detectors"""
    canonical_size: float = 224.0
    """edge of the RoI that is pooled from P4 (Eq. 1 of the FPN paper)"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        yield from super().faults()
        if self.block != "convolution" and not self.convolutions:
            yield "block", "convolutions is 0, so there would be none: set it to 1 or more, or block convolution"
        elif self.block == "inception" and self.convolution_channels % INCEPTION_BRANCHES:
            yield "convolution_channels", f"an inception block has {INCEPTION_BRANCHES} equal parts: choose a multiple"
        if len({*self.regions}) < len(self.regions) or not {*self.regions} <= {*REGIONS}:
            yield "regions", f"it must be some of {', '.join(REGIONS)}, each once"


@dataclass(frozen=True)
class PositionSensitiveHead(RoiHead):
    """The second stage of R-FCN: maps of every class and of boxes for each bin of a RoI, pooled and averaged."""

    channels: AtLeastOne = 1024
    """channels of the 1 x 1 convolution before the maps; a light head has no such convolution"""
    norm: NormKind = "none"
    """norm layer after that convolution, or after the large kernel of a light head; batch needs bn_size > 0"""
    pool_size: AtLeastOne = 7
    """bins along each edge of a RoI, the paper's k; there are k^2 (classes + 1 + 4) maps"""
    sampling_ratio: AtLeastOne = 2
    """sampling points of a bin along each edge"""
    light_kernel: NotNegative = 0
    """k of the large convolution of a light head, 15 in its paper; 0 = no light head, the maps vote as in R-FCN"""
    light_channels: AtLeastOne = 256
    """channels of the large convolution between its two steps; 64 in the small models of its paper"""
    thin_channels: AtLeastOne = 10
    """channels for each bin of the thin map that the large convolution makes"""
    layer_channels: AtLeastOne = 2048
    """width of the fully connected layer after the pooling of a light head"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        yield from super().faults()
        if self.light_kernel and (self.light_kernel < 3 or self.light_kernel % 2 == 0):
            yield "light_kernel", "it must be an odd number from 3 on, or 0"


@dataclass(frozen=True)
class MaskHead:
    """The mask branch of Mask R-CNN: RoIAlign, convolutions, a mask for every class."""

    convolutions: AtLeastOne = 4
    """3 x 3 convolutions before the map is doubled in height and width"""
    channels: AtLeastOne = 256
    """channels of each convolution"""
    norm: NormKind = "none"
    """norm layer after each 3 x 3 convolution; batch needs bn_size > 0"""
    pool_size: AtLeastOne = 14
    """bins along each edge of a pooled RoI; a mask has twice as many"""
    sampling_ratio: NotNegative = 2
    """sampling points of a bin along each edge; 0 = one for each pixel that it spans, for which a GPU waits"""
    aligned: bool = True
    """shift coordinates by half a pixel, the correct form of RoIAlign; false gives torchvision's detectors"""
    exact_paste: bool = True
    """paste a mask at its exact box; false rounds the box to whole pixels first, as torchvision does"""


@dataclass(frozen=True)
class Cascade:
    """The stages of a cascade: each refines the boxes of the stage before, with a higher IoU for positives."""

    positive_ious: tuple[float, float] = (0.6, 0.7)
    """IoU from which a box is positive in the second and third stage; the first uses positive_iou of box_head"""
    loss_weights: tuple[float, float, float] = (1.0, 0.5, 0.25)
    """factors of the losses of the stages; these are mmdetection's, the paper names none"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        if not all(0 <= iou <= 1 for iou in self.positive_ious):
            yield "positive_ious", "an overlap is from 0 to 1"
        if min(self.loss_weights) < 0:
            yield "loss_weights", "they must not be negative"
