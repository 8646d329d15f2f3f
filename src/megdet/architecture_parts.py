"""The parts of detectors in a recipe: the sections of `recipe.model`, a dataclass each.

The defaults are the paper's baseline: ResNet-50 on a feature pyramid (Sec. 4).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megdet.bounds import AtLeastOne, Fraction, NotNegative, NotNegativeNumber

NormKind = Literal["batch", "frozen", "group", "none"]
BoxLossKind = Literal["smooth_l1", "giou"]


@dataclass(frozen=True)
class Backbone:
    """The network that turns an image into features C2 to C5 at strides 4 to 32."""

    name: str = "resnet50"
    """any timm model that offers features at these strides; its drop rates are set to 0 (the contract)"""
    weights: str = ""
    """file of trained weights, torchvision's or timm's tensors (.pth or .safetensors); empty = random weights"""
    last_convolution: bool = False
    """put the 1 x 1 convolution that the model has before its classifier on its last features (MobileNet has one)"""
    stride_in_1x1: bool = False
    """a bottleneck halves the map in its first 1 x 1 convolution, as in the first ResNets, not in its 3 x 3 one"""
    norm: NormKind = "batch"
    """batch = statistics over bn_size images (frozen where bn_size is 0), frozen, group or none"""
    norm_eps: NotNegativeNumber | None = None
    """eps of the norm layers, instead of the model's own; torchvision's COCO_V1 detectors have 0"""
    frozen_stages: NotNegative = 0
    """the stem (1) and the next stages (2 to 5) that are not trained; 2 in recipes of BN size 0 (ours)"""
    output_stride: int = 32
    """the largest stride, 32, 16 or 8: with 16 the last stage is atrous (dilated, not strided), with 8 the last two"""
    deformable_stages: tuple[int, ...] = ()
    """the stages (3 to 5, counted as above) whose 3 x 3 convolutions are deformable"""
    deformable_modulated: bool = False
    """weigh every sample of a deformable convolution too (its version 2)"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of what cannot be."""
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
    """k of global convolutions (k x 1, 1 x k) as lateral connections, with boundary refinement; 0 = 1 x 1 ones"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of what cannot be."""
        if self.large_kernel and (self.large_kernel < 3 or self.large_kernel % 2 == 0):
            yield "large_kernel", "it must be an odd number from 3 on, or 0"


@dataclass(frozen=True)
class StridedFpn(Fpn):
    """The feature pyramid of a detector of one stage: P3 to P5 from the backbone, P6 and P7 by strided convolutions."""

    p6_from: Literal["c5", "p5"] = "c5"
    """of what P6 is made: C5 as in the paper, or P5; the convolutions of P6 and P7 have no norm layer"""


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
    """round the edges of the anchors at a cell to whole pixels; false as detectron2 has them"""

    @property
    def level_sizes(self) -> tuple[tuple[float, ...], ...]:
        """The sizes on each level."""
        return tuple((size,) for size in self.sizes)

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of what cannot be."""
        if len(self.sizes) != 5 or min(self.sizes) <= 0:
            yield "sizes", "it must be five positive sizes, for P2 to P6"
        if not self.ratios or min(self.ratios) <= 0:
            yield "ratios", "it must be positive ratios"


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
        """(key, why) of what cannot be."""
        if not self.sizes or min(self.sizes) <= 0:
            yield "sizes", "it must be positive sizes"
        if not self.ratios or min(self.ratios) <= 0:
            yield "ratios", "it must be positive ratios"


@dataclass(frozen=True)
class OctaveAnchors(Anchors):
    """The boxes that a detector of one stage starts from, several sizes a level."""

    sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """edge in pixels of the smallest square of equal area, for P3 to P7"""
    scales_per_octave: AtLeastOne = 3
    """sizes of a level: with 3 they are size, size * 2^(1/3) and size * 2^(2/3)"""
    whole_sizes: bool = False
    """cut these sizes down to whole pixels, as torchvision does"""
    stride_from_grid: bool = False
    """take a level's stride as canvas // grid, as torchvision does, instead of 8, 16, 32, 64, 128"""

    @property
    def level_sizes(self) -> tuple[tuple[float, ...], ...]:
        """The sizes on each level."""
        factors = [2 ** (i / self.scales_per_octave) for i in range(self.scales_per_octave)]
        exact = (tuple(size * factor for factor in factors) for size in self.sizes)
        return tuple(tuple(float(int(size)) for size in own) if self.whole_sizes else own for own in exact)

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of what cannot be."""
        if len(self.sizes) != 5 or min(self.sizes) <= 0:
            yield "sizes", "it must be five positive sizes, for P3 to P7"
        elif self.whole_sizes and min(self.sizes) < 1:
            yield "sizes", "cut down to whole pixels the smallest would be 0: set model.anchors.whole_sizes false"
        if not self.ratios or min(self.ratios) <= 0:
            yield "ratios", "it must be positive ratios"


@dataclass(frozen=True)
class Rpn:
    """The region proposal network."""

    convolutions: AtLeastOne = 1
    """3 x 3 convolutions before the two layers that predict"""
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
    """where smooth_l1 turns from square to linear, in units of the regression targets"""
    train_proposals_before_nms: AtLeastOne = 2000
    """best anchors a level and image that enter the NMS while training"""
    train_proposals: AtLeastOne = 1000
    """proposals an image that leave the NMS while training"""
    test_proposals_before_nms: AtLeastOne = 1000
    """best anchors a level and image that enter the NMS while testing"""
    test_proposals: AtLeastOne = 1000
    """proposals an image that leave the NMS while testing"""
    nms_iou: Fraction = 0.7
    """proposals of one level that overlap more are suppressed"""
    min_size: NotNegativeNumber = 1e-3
    """proposals with an edge shorter than this many pixels are dropped"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of what cannot be."""
        if self.negative_iou > self.positive_iou:
            yield "negative_iou", f"it must not exceed positive_iou {self.positive_iou}"


@dataclass(frozen=True)
class Segmentation:
    """The branch that learns which class every place shows, and adds what it sees to the feature pyramid."""

    enabled: bool = False
    """have one; it learns from the masks of the objects, and from the box of an object that has no mask"""
    convolutions: AtLeastOne = 2
    """3 x 3 convolutions on the mean of all levels, at the stride of P3"""
    norm: NormKind = "none"
    """norm layer after each of them; batch needs bn_size > 0"""
    loss_weight: NotNegativeNumber = 0.2
    """factor of its loss; this is HTC's, the papers of segmentation supervision differ"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of what cannot be."""
        for key, value in vars(self).items():
            if not self.enabled and value != getattr(Segmentation(), key):
                yield key, "there is no branch that would use it: set model.segmentation.enabled true"


@dataclass(frozen=True)
class DenseHead:
    """RetinaNet's head: two towers of convolutions over all levels, one for the classes and one for the boxes."""

    convolutions: AtLeastOne = 4
    """3 x 3 convolutions of each tower before the one that predicts"""
    norm: NormKind = "none"
    """norm layer after each of them; batch needs bn_size > 0 and takes its statistics of all levels together"""
    prior: Fraction = 0.01
    """score of every class at every anchor at the start of training"""
    positive_iou: Fraction = 0.5
    """an anchor of at least this overlap with a box is positive, and so is the best anchor of a box"""
    negative_iou: Fraction = 0.4
    """an anchor below this overlap with every box is negative; one between the two has no loss"""
    focal_alpha: Fraction = 0.25
    """weight of the positive terms of the focal loss; the negative ones have 1 - this"""
    focal_gamma: NotNegativeNumber = 2.0
    """how much the focal loss turns to what is hard; 0 = cross-entropy"""
    box_loss: BoxLossKind = "smooth_l1"
    """smooth_l1 of the regression targets, or giou = 1 - the generalised IoU of the boxes themselves"""
    smooth_l1_beta: NotNegativeNumber = 0.0
    """where smooth_l1 turns from square to linear, in units of the regression targets; 0 = L1, as torchvision"""
    candidates: AtLeastOne = 1000
    """best pairs of an anchor and a class, a level and image, that enter the NMS"""
    score_threshold: Fraction = 0.05
    """detections below this score are dropped"""
    nms_iou: Fraction = 0.5
    """detections of one class that overlap more are suppressed"""
    detections: AtLeastOne = 100
    """detections an image"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of what cannot be."""
        if not 0 < self.prior < 1:
            yield "prior", "it must lie between 0 and 1, without them"
        if self.negative_iou > self.positive_iou:
            yield "negative_iou", f"it must not exceed positive_iou {self.positive_iou}"
