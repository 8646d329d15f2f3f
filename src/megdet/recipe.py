"""The recipe: every knob of a training run, its default and its meaning, on one page.

A recipe counts images and never devices. The defaults are the paper's baseline: ResNet-50 FPN, 16 images a step, batch
norm over 16 images, SGD with momentum 0.9, weight decay 1e-4, rate 0.02 for 16 images and the `normal` policy (Sec. 4).
A derived number (the learning rate, the steps of an epoch) is a function of the recipe, never a field of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from megdet.bounds import AtLeastOne, Fraction, NotNegative, NotNegativeNumber

NormKind = Literal["batch", "frozen", "group", "none"]
OptimizerKind = Literal["sgd", "adamw", "lars", "lamb"]
ResizeKind = Literal["antialias", "torchvision"]
Precision = Literal["float32", "tf32", "bfloat16", "float64"]
RecomputePlan = Literal["none", "block", "stage", "sqrt"]


@dataclass(frozen=True)
class Data:
    """Where the images are and how they are prepared."""

    train_annotations: str = "data/coco/annotations/instances_train2017.json"
    """COCO instances file to train on; a relative path counts from the working directory"""
    train_images: str = "data/coco/train2017"
    """folder of the training images"""
    val_annotations: str = "data/coco/annotations/instances_val2017.json"
    """COCO instances file to evaluate on"""
    val_images: str = "data/coco/val2017"
    """folder of the validation images"""
    draw_demo: Literal["", "easy", "hard", "tiny"] = ""
    """if not empty and the annotations are missing, draw the demo data set into the folder above them"""
    keep_empty_images: bool = False
    """train on images without any box too"""
    allow_outside_files: bool = False
    """read images whose file_name is absolute or has .. in it, so that an annotation file may name any file"""
    max_pixels: AtLeastOne = 80_000_000
    """pixels (height x width of the file) of the largest image that is decoded"""
    short_edges: tuple[int, ...] = (800,)
    """lengths in pixels of the shorter edge; one is drawn for each training group, the last is used for evaluation"""
    max_long_edge: AtLeastOne = 1333
    """the longer edge is not resized beyond this many pixels (times the factor of scale_jitter)"""
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    """a training group's size is multiplied by a factor drawn between these two, uniform in its logarithm"""
    resize: ResizeKind = "antialias"
    """antialias = bilinear as Pillow's, sizes rounded; torchvision = as its detectors: no antialias, sizes cut down"""
    horizontal_flip: Fraction = 0.5
    """probability of mirroring a training image left to right"""
    vertical_flip: Fraction = 0.0
    """probability of mirroring a training image top to bottom"""
    color_jitter: NotNegativeNumber = 0.0
    """strength of random brightness, contrast and saturation of a training image; 0.4 is strong"""
    canvas_multiple: AtLeastOne = 32
    """a group's canvas is rounded up to a multiple of this many pixels"""
    canvas_edges: tuple[int, ...] = ()
    """rising lengths in pixels to which a canvas is rounded up instead, as far as they reach; a few for --compile"""
    cache: Literal["none", "decoded", "resized"] = "none"
    """keep training images as files of raw pixels, decoded or already resized (one size an image only); same result"""
    cache_folder: str = "data/cache"
    """folder of these files, which may be shared and may be deleted at any time"""
    cache_gib: NotNegativeNumber = 50.0
    """most GiB of them; the first images of the data set are kept, as many as fit"""


@dataclass(frozen=True)
class Backbone:
    """The network that turns an image into features at strides 4 to 32."""

    name: str = "resnet50"
    """any timm model that offers features at these strides; its drop rates are set to 0 (the contract: no chance)"""
    weights: str = ""
    """file of trained weights, torchvision's or timm's tensors (.pth or .safetensors); empty = random weights"""
    last_convolution: bool = False
    """put the 1 x 1 convolution that the model has before its classifier on its last features (MobileNet has one)"""
    norm: NormKind = "batch"
    """batch = statistics over bn_size images (frozen where bn_size is 0), frozen, group or none"""
    norm_eps: NotNegativeNumber | None = None
    """what the norm layers add to a variance instead of the model's own; torchvision's COCO_V1 detectors have 0"""
    frozen_stages: NotNegative = 0
    """the stem (1) and the next stages (2 to 5) that are not trained; 2 in recipes of BN size 0 (ours)"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of what cannot be."""
        if self.frozen_stages > 5:
            yield "frozen_stages", "a backbone has a stem and four stages: at most 5"


@dataclass(frozen=True)
class Fpn:
    """The feature pyramid: P2 to P5 from the backbone and P6 by subsampling P5."""

    channels: AtLeastOne = 256
    """channels of every level"""
    norm: NormKind = "none"
    """norm layer after each convolution; batch needs bn_size > 0"""


@dataclass(frozen=True)
class Anchors:
    """The boxes that the RPN starts from, one size a level."""

    sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """edge in pixels of the square of equal area, for P2 to P6"""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """height over width"""
    stride_from_grid: bool = False
    """take a level's stride as canvas // grid, as torchvision does, instead of 4, 8, 16, 32, 64"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of what cannot be."""
        if len(self.sizes) != 5 or min(self.sizes) <= 0:
            yield "sizes", "it must be five positive sizes, for P2 to P6"
        if not self.ratios or min(self.ratios) <= 0:
            yield "ratios", "it must be positive ratios"


@dataclass(frozen=True)
class Rpn:
    """The region proposal network."""

    norm: NormKind = "none"
    """norm layer after the 3 x 3 convolution; batch needs bn_size > 0"""
    sparse_loss: bool = True
    """backpropagate only through the cells of sampled anchors: the same gradient, less work; norm none only"""
    samples: AtLeastOne = 256
    """anchors an image in the loss"""
    positive_fraction: Fraction = 0.5
    """largest part of them that is positive"""
    positive_iou: Fraction = 0.7
    """an anchor of at least this overlap with a box is positive"""
    negative_iou: Fraction = 0.3
    """an anchor below this overlap with every box is negative"""
    smooth_l1_beta: NotNegativeNumber = 1 / 9
    """where the box loss turns from square to linear, in units of the regression targets"""
    train_proposals_before_nms: AtLeastOne = 2000
    """best anchors a level and image that enter the NMS while training"""
    train_proposals: AtLeastOne = 1000
    """proposals an image that leave it while training"""
    test_proposals_before_nms: AtLeastOne = 1000
    """the same while testing"""
    test_proposals: AtLeastOne = 1000
    """the same while testing"""
    nms_iou: Fraction = 0.7
    """proposals of one level that overlap more are suppressed"""
    min_size: NotNegativeNumber = 1e-3
    """proposals with an edge shorter than this many pixels are dropped"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of what cannot be."""
        if self.negative_iou > self.positive_iou:
            yield "negative_iou", f"it must not exceed positive_iou {self.positive_iou}"


@dataclass(frozen=True)
class BoxHead:
    """The second stage: RoIAlign, two fully connected layers, classes and boxes."""

    channels: AtLeastOne = 1024
    """width of the fully connected layers"""
    norm: NormKind = "none"
    """norm layer after each fully connected layer; batch needs bn_size > 0"""
    pool_size: AtLeastOne = 7
    """bins along each edge of a pooled RoI"""
    sampling_ratio: AtLeastOne = 2
    """sampling points of a bin along each edge"""
    aligned: bool = True
    """shift coordinates by half a pixel, as they should be; false gives torchvision's detectors"""
    canonical_size: float = 224.0
    """edge of the RoI that is pooled from P4 (Eq. 1 of the FPN paper)"""
    samples: AtLeastOne = 512
    """RoIs an image in the loss"""
    positive_fraction: Fraction = 0.25
    """largest part of them that is positive"""
    positive_iou: Fraction = 0.5
    """a RoI of at least this overlap with a box is positive, any other negative"""
    smooth_l1_beta: NotNegativeNumber = 1 / 9
    """where the box loss turns from square to linear, in units of the regression targets"""
    score_threshold: Fraction = 0.05
    """detections below this score are dropped"""
    nms_iou: Fraction = 0.5
    """detections of one class that overlap more are suppressed"""
    detections: AtLeastOne = 100
    """detections an image"""


@dataclass(frozen=True)
class Model:
    """What every detector is built from besides its classes. Each kind of detector has a subclass."""

    kind: str
    """which detector it is"""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """mean of the red, green and blue values, of 1.0, that is subtracted"""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """standard deviation of red, green and blue that divides them"""
    backbone: Backbone = field(default_factory=Backbone)

    @property
    def norms(self) -> dict[str, NormKind]:
        """The norm layers asked for, by the section that asks."""
        return {name: section.norm for name, section in vars(self).items() if hasattr(section, "norm")}

    def with_norms(self, norms: Mapping[str, NormKind]) -> "Model":
        """The same with other norm layers in some sections."""
        return replace(self, **{name: replace(getattr(self, name), norm=norm) for name, norm in norms.items()})

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of what cannot be."""
        if min(self.std) <= 0:
            yield "std", "every value must be positive"


@dataclass(frozen=True)
class FasterRcnn(Model):
    """Faster R-CNN on a feature pyramid, the paper's detector (Sec. 4)."""

    kind: Literal["faster_rcnn"] = "faster_rcnn"
    """which detector it is; the other keys of the section are those of this kind"""
    fpn: Fpn = field(default_factory=Fpn)
    anchors: Anchors = field(default_factory=Anchors)
    rpn: Rpn = field(default_factory=Rpn)
    box_head: BoxHead = field(default_factory=BoxHead)


MODELS: dict[str, type[Model]] = {"faster_rcnn": FasterRcnn}
"""The kinds of detectors, by `model.kind`; `megdet.model.choice` has the detector of each."""


@dataclass(frozen=True)
class Optimizer:
    """How a gradient becomes a step, and the rate for 16 images."""

    kind: OptimizerKind = "sgd"
    """sgd with momentum is the paper's; adamw, lars and lamb need another base_lr (docs/large-batch.md)"""
    base_lr: NotNegativeNumber = 0.02
    """learning rate for a mini-batch of 16 images; scaling says how it grows with the mini-batch (Sec. 3.2)"""
    scaling: Literal["linear", "sqrt"] = "linear"
    """the rate is base_lr * batch_size / 16 (Sec. 3.2), or with sqrt base_lr * (batch_size / 16) ** 0.5"""
    momentum: float = 0.9
    """momentum of sgd and lars"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay a step of the first and the second moment of the gradient, of adamw and lamb"""
    eps: float = 1e-8
    """what adamw and lamb add to the root of the second moment; LAMB's authors take 1e-6"""
    trust_coefficient: float = 1e-3
    """eta of lars: its local rate is eta * |weights| / (|gradient| + weight_decay * |weights|)"""
    weight_decay: NotNegativeNumber = 1e-4
    """lambda of Eq. 1: added to the gradient by sgd and lars, taken off the weights beside it by adamw and lamb"""
    decay_norm_and_bias: bool = True
    """decay the weights of norm layers and all biases too; turn off when batch norm is trained from scratch"""
    clip_norm: NotNegativeNumber = 0.0
    """largest norm of the whole gradient; 0 = no clipping"""
    agvm: bool = False
    """AGVM: a rate for each module by how much the halves of a mini-batch agree about it; sgd and adamw only"""
    ema_decay: float = 0.0
    """decay a step of an exponential moving average of weights and buffers, which is then evaluated; 0 = none"""


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves. Milestones are in epochs."""

    policy: Literal["normal", "long", "step", "cosine"] = "normal"
    """normal: x0.1 at 8 and 10, end at 11; long: x0.1 at 11 and 14, x0.5 at 17, end at 18; step and cosine as below"""
    epochs: float | None = None
    """length of policies step and cosine, which need it; normal and long have their own"""
    milestones: tuple[float, ...] = ()
    """epochs at which policy step multiplies the rate"""
    factors: tuple[float, ...] = ()
    """what policy step multiplies it by, one a milestone"""
    warmup: Literal["linear", "exponential"] = "linear"
    """how the rate rises: by the same amount every step, or by the same factor, which needs warmup_start above 0"""
    warmup_steps: NotNegative = 500
    """steps of warmup. Not in the paper, which gives no number: 500 is ours"""
    warmup_start: NotNegativeNumber = 1.0
    """the warmup starts at this times base_lr (the paper's r), not above its end: with 1, 16 images have none"""


@dataclass(frozen=True)
class Evaluation:
    """When and how the detector is evaluated while it trains."""

    every_epochs: NotNegative = 1
    """epochs between evaluations; 0 = only at the end"""
    batch_size: AtLeastOne = 8
    """images that share one forward, at most; each is on the canvas of its own size"""


@dataclass(frozen=True)
class Recipe:
    """A training run, told in images."""

    batch_size: AtLeastOne = 16
    """images per optimizer step, over all devices and accumulation (the paper's mini-batch size)"""
    bn_size: NotNegative = 16
    """images whose pixels share one set of batch-norm statistics (the paper's BN size); 0 = frozen statistics"""
    group_size: AtLeastOne = 2
    """images padded to one common canvas where bn_size is 0; else it is bn_size of them"""
    plan_window: AtLeastOne = 4
    """mini-batches within which images of like aspect ratio are brought together"""
    precision: Precision = "float32"
    """arithmetic of convolutions and matrix products; tf32 (on a CPU float32) and bfloat16 keep weights in float32"""
    recompute: RecomputePlan = "none"
    """save memory: the backward computes again what is inside each block, stage or run of blocks; the same result"""
    noise_interval: NotNegative = 0
    """steps from one measurement of the gradient noise scale to the next; 0 = none"""
    seed: NotNegative = 0
    """the one seed of weights, order, augmentation and sampling"""
    checkpoint_epochs: AtLeastOne = 1
    """epochs between checkpoints"""
    keep_checkpoints: AtLeastOne = 2
    """checkpoints that are kept"""
    start_from: str = ""
    """folder of another run whose newest weights to start from; class layers start anew where classes differ"""
    tensorboard: bool = False
    """also write the metrics for TensorBoard"""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=FasterRcnn)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    evaluation: Evaluation = field(default_factory=Evaluation)

    @property
    def images_per_group(self) -> int:
        """Images normalised together and padded to one canvas: bn_size, or group_size where statistics are frozen."""
        return self.bn_size or self.group_size

    @property
    def groups_per_step(self) -> int:
        """Groups of a mini-batch."""
        return self.batch_size // self.images_per_group
