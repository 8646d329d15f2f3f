"""The parts of detectors in a recipe: sections of `recipe.model`, a dataclass each.

The defaults are the paper's baseline: ResNet-50 on a feature pyramid (Sec. 4).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import Literal

from megdet.bounds import AtLeastOne, Fraction, NotNegative, NotNegativeNumber

NormKind = Literal["batch", "frozen", "group", "none"]
BoxLossKind = Literal["smooth_l1", "giou"]


@dataclass(frozen=True)
class Backbone:
    """The network that turns an image into features C2 to C5 at strides 4 to 32."""

    name: str = "resnet50"
    """any timm model with features at these strides; its drop rates are set to 0, since nothing may be random"""
    weights: str = ""
    """file of trained weights of torchvision or timm (.pth or .safetensors); empty = random weights"""
    last_convolution: bool = False
    """apply the 1 x 1 convolution before the model's classifier to its last features (MobileNet has one)"""
    stride_in_1x1: bool = False
    """put the stride of a bottleneck into its first 1 x 1 convolution, as in the first ResNets, not the 3 x 3"""
    norm: NormKind = "batch"
    """batch = statistics over bn_size images (frozen if bn_size is 0), frozen, group or none"""
    norm_eps: NotNegativeNumber | None = None
    """eps of the norm layers, instead of the model's own; torchvision's COCO_V1 detectors have 0"""
    frozen_stages: NotNegative = 0
    """number of first stages that are not trained: 1 = the stem, up to 5; 2 in our recipes of BN size 0"""
    output_stride: int = 32
    """the largest stride, 32, 16 or 8: with 16 the last stage is atrous (dilated, not strided), with 8 the last two"""
    deformable_stages: tuple[int, ...] = ()
    """the stages (3 to 5, counted as above) whose 3 x 3 convolutions are deformable"""
    deformable_modulated: bool = False
    """also weight every sample of a deformable convolution (version 2)"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        if self.frozen_stages > 5:
            yield "frozen_stages", "a backbone has a stem and four stages: at most 5"
        if self.output_stride not in (32, 16, 8):
            yield "output_stride", "it must be 32, 16 or 8"
        stages = self.deformable_stages
        if len({*stages}) < len(stages) or not {*stages} <= {3, 4, 5}:
            yield "deformable_stages", "it must be some of the stages 3, 4 and 5, each once"
        if any(stage <= self.frozen_stages for stage in stages):
            frozen = f"frozen_stages is {self.frozen_stages}"
            yield "deformable_stages", f"{frozen}, and the offsets of a frozen stage would stay 0: choose later stages"
        if self.deformable_modulated and not stages:
            yield "deformable_modulated", "no stage is deformable: name some in deformable_stages"


@dataclass(frozen=True)
class AtrousBackbone(Backbone):
    """The network that turns an image into features, its last stage atrous."""

    output_stride: int = 16
    """the largest stride, 32, 16 or 8: with 16 the last stage is atrous (dilated, not strided), with 8 the last two"""


@dataclass(frozen=True)
class Fpn:
    """The feature pyramid: P2 to P5 from the backbone and P6 by subsampling P5."""

    channels: AtLeastOne = 256
    """channels of every level"""
    norm: NormKind = "none"
    """norm layer after each convolution; batch needs bn_size > 0"""
    large_kernel: NotNegative = 0
    """k of large convolutions (k x 1, 1 x k) as lateral connections, with boundary refinement; 0 = 1 x 1"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        if self.large_kernel and (self.large_kernel < 3 or self.large_kernel % 2 == 0):
            yield "large_kernel", "it must be an odd number from 3 on, or 0"


@dataclass(frozen=True)
class StridedFpn(Fpn):
    """The feature pyramid of a one-stage detector: P3 to P5 from the backbone, P6 and P7 by strided convolutions."""

    p6_from: Literal["c5", "p5"] = "c5"
    """the map that P6 is made from: C5 as in the paper, or P5; convolutions of P6 and P7 have no norm layer"""


@dataclass(frozen=True)
class Anchors:
    """The boxes that the RPN starts from, one size a level."""

    sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """edge in pixels of the square of equal area, for P2 to P6"""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """height over width"""
    stride_from_grid: bool = False
    """take a level's stride as canvas // grid, as torchvision does, instead of 4, 8, 16, 32, 64"""
    whole_pixels: bool = True
    """round the edges of the anchors at a cell to whole pixels; false as in detectron2"""

    @property
    def level_sizes(self) -> tuple[tuple[float, ...], ...]:
        """The sizes on each level."""
        return tuple((size,) for size in self.sizes)

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        if len(self.sizes) != 5 or min(self.sizes) <= 0:
            yield "sizes", "it must be five positive sizes, for P2 to P6"
        if not self.ratios or min(self.ratios) <= 0:
            yield "ratios", "it must be positive ratios"


def flat_anchor(
    level_sizes: Iterable[Iterable[int | float]], ratios: Iterable[int | float]
) -> tuple[float, float] | None:
    """The size and ratio of an anchor that has no area once half its edges are rounded to whole pixels, if any has."""
    for size, ratio in product(chain.from_iterable(level_sizes), ratios):
        if size > 0 and min(round(size * ratio**0.5 / 2), round(size / ratio**0.5 / 2)) == 0:
            return float(size), float(ratio)
    return None


@dataclass(frozen=True)
class SingleLevelAnchors(Anchors):
    """The boxes that the RPN of a detector without a pyramid starts from, all sizes at every cell of one level."""

    sizes: tuple[float, ...] = (64.0, 128.0, 256.0, 512.0)
    """edge in pixels of the square of equal area"""
    stride_from_grid: bool = False
    """take the stride as canvas // grid instead of 16"""

    @property
    def level_sizes(self) -> tuple[tuple[float, ...], ...]:
        """The sizes on each level."""
        return (self.sizes,)

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        if not self.sizes or min(self.sizes) <= 0:
            yield "sizes", "it must be positive sizes"
        if not self.ratios or min(self.ratios) <= 0:
            yield "ratios", "it must be positive ratios"


@dataclass(frozen=True)
class OctaveAnchors(Anchors):
    """The boxes that a one-stage detector starts from, several sizes a level."""

    sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """edge in pixels of the smallest square of equal area, for P3 to P7"""
    scales_per_octave: AtLeastOne = 3
    """sizes of a level: with 3 they are size, size * 2^(1/3) and size * 2^(2/3)"""
    whole_sizes: bool = False
    """round the anchor sizes down to whole pixels, as torchvision does"""
    stride_from_grid: bool = False
    """take a level's stride as canvas // grid, as torchvision does, instead of 8, 16, 32, 64, 128"""

    @property
    def level_sizes(self) -> tuple[tuple[float, ...], ...]:
        """The sizes on each level."""
        factors = [2 ** (i / self.scales_per_octave) for i in range(self.scales_per_octave)]
        exact = (tuple(size * factor for factor in factors) for size in self.sizes)
        return tuple(tuple(float(int(size)) for size in own) if self.whole_sizes else own for own in exact)

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        if len(self.sizes) != 5 or min(self.sizes) <= 0:
            yield "sizes", "it must be five positive sizes, for P3 to P7"
        elif self.whole_sizes and min(self.sizes) < 1:
            yield "sizes", "rounded down to whole pixels the smallest would be 0: set model.anchors.whole_sizes false"
        if not self.ratios or min(self.ratios) <= 0:
            yield "ratios", "it must be positive ratios"


@dataclass(frozen=True)
class Rpn:
    """The region proposal network."""

    convolutions: AtLeastOne = 1
    """3 x 3 convolutions before the two predicting layers"""
    norm: NormKind = "none"
    """norm layer after each 3 x 3 convolution; batch needs bn_size > 0"""
    sparse_loss: bool = True
    """backpropagate only through the cells of sampled anchors: the same gradient, less work; norm none only"""
    samples: AtLeastOne = 256
    """anchors an image in the loss"""
    positive_fraction: Fraction = 0.5
    """largest part of the samples that is positive"""
    positive_iou: Fraction = 0.7
    """an anchor of at least this overlap with a box is positive"""
    negative_iou: Fraction = 0.3
    """an anchor below this overlap with every box is negative"""
    box_loss: BoxLossKind = "smooth_l1"
    """smooth_l1 of the regression targets, or giou = 1 - the generalised IoU of the boxes themselves"""
    smooth_l1_beta: NotNegativeNumber = 1 / 9
    """the error at which smooth_l1 turns from square to linear, in units of the regression targets"""
    train_proposals_before_nms: AtLeastOne = 2000
    """while training: best anchors, for each level and image, that enter NMS"""
    train_proposals: AtLeastOne = 1000
    """while training: proposals an image after NMS"""
    test_proposals_before_nms: AtLeastOne = 1000
    """while testing: best anchors, for each level and image, that enter NMS"""
    test_proposals: AtLeastOne = 1000
    """while testing: proposals an image after NMS"""
    nms_iou: Fraction = 0.7
    """proposals of one level that overlap more are suppressed"""
    min_size: NotNegativeNumber = 1e-3
    """proposals with an edge shorter than this many pixels are dropped"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        if self.negative_iou > self.positive_iou:
            yield "negative_iou", f"it must not exceed positive_iou {self.positive_iou}"


@dataclass(frozen=True)
class Segmentation:
    """The branch that learns the class of every cell and adds its features to the feature pyramid."""

    enabled: bool = False
    """have this branch; it learns from the masks of objects, and from the box of an object without a mask"""
    convolutions: AtLeastOne = 2
    """3 x 3 convolutions on the mean of all levels, at the stride of P3"""
    norm: NormKind = "none"
    """norm layer after each of these convolutions; batch needs bn_size > 0"""
    loss_weight: NotNegativeNumber = 0.2
    """factor of its loss; the default is HTC's, papers on segmentation supervision differ"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        for key, value in vars(self).items():
            if not self.enabled and value != getattr(Segmentation(), key):
                yield key, "no branch would use it: set model.segmentation.enabled true"


@dataclass(frozen=True)
class DenseHead:
    """RetinaNet's head: two towers of convolutions over all levels, one for the classes and one for the boxes."""

    convolutions: AtLeastOne = 4
    """3 x 3 convolutions of each tower before the predicting one"""
    norm: NormKind = "none"
    """norm layer after each of these convolutions; batch needs bn_size > 0 and has statistics of all levels together"""
    prior: Fraction = 0.01
    """score of every class at every anchor at the start of training"""
    positive_iou: Fraction = 0.5
    """an anchor of at least this overlap with a box is positive, and so is the best anchor of a box"""
    negative_iou: Fraction = 0.4
    """an anchor below this overlap with every box is negative; between negative_iou and positive_iou it has no loss"""
    focal_alpha: Fraction = 0.25
    """weight of the positive terms of the focal loss; negative terms have 1 minus this"""
    focal_gamma: NotNegativeNumber = 2.0
    """gamma of the focal loss: larger values put more weight on hard anchors; 0 = cross-entropy"""
    box_loss: BoxLossKind = "smooth_l1"
    """smooth_l1 of the regression targets, or giou = 1 - the generalised IoU of the boxes themselves"""
    smooth_l1_beta: NotNegativeNumber = 0.0
    """the error at which smooth_l1 turns from square to linear, in units of the targets; 0 = L1, as torchvision"""
    candidates: AtLeastOne = 1000
    """best pairs of an anchor and a class, for each level and image, that enter NMS"""
    score_threshold: Fraction = 0.05
    """detections below this score are dropped"""
    nms_iou: Fraction = 0.5
    """detections of one class that overlap more are suppressed"""
    detections: AtLeastOne = 100
    """detections an image"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        if not 0 < self.prior < 1:
            yield "prior", "it must lie between 0 and 1, without them"
        if self.negative_iou > self.positive_iou:
            yield "negative_iou", f"it must not exceed positive_iou {self.positive_iou}"
