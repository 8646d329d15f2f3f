"""The recipe: every knob of a training run, its default and its meaning, on one page.

The kinds of `model` are in `architecture.py`, their sections in `architecture_parts.py` and `architecture_heads.py`.

A recipe counts images and never devices. The defaults are the paper's baseline: ResNet-50 FPN, 16 images a step, batch
norm over 16 images, SGD with momentum 0.9, weight decay 1e-4, rate 0.02 for 16 images and the `normal` policy (Sec. 4).
A derived number (the learning rate, the steps of an epoch) is a function of the recipe, never a field of it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megdet.architecture import FasterRcnn, Model
from megdet.bounds import AtLeastOne, Fraction, NotNegative, NotNegativeNumber

OptimizerKind = Literal["sgd", "adamw", "lars", "lamb"]
ResizeKind = Literal["antialias", "torchvision"]
ScaleLaw = Literal["logarithm", "factor"]
Precision = Literal["float32", "tf32", "bfloat16", "float64"]
RecomputePlan = Literal["none", "block", "stage", "sqrt"]
WatchAction = Literal["stop", "skip", "roll_back"]
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""What `trackers` may name."""
MergeKind = Literal["vote", "nms", "soft-nms", "gaussian-soft-nms", "wbf"]


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
    unreadable: Literal["stop", "replace"] = "stop"
    """a training image whose file is lost or damaged: stop the run, or replace the image by the next one of the plan"""
    most_replaced: Fraction = 0.01
    """with unreadable replace: part of the training images that may be lost (one always may) before the run stops"""
    max_pixels: AtLeastOne = 80_000_000
    """pixels (height x width of the file) of the largest image that is decoded"""
    short_edges: tuple[int, ...] = (800,)
    """lengths in pixels of the shorter edge; each training group draws one, evaluation uses the last"""
    max_long_edge: AtLeastOne = 1333
    """the longer edge is not resized beyond this many pixels (times the factor of scale_jitter)"""
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    """each training group draws a factor between these two that multiplies its size"""
    scale_law: ScaleLaw = "logarithm"
    """what is uniform in that draw: the factor's logarithm, or the factor itself, as large-scale jitter has it"""
    crop: tuple[int, ...] = ()
    """height and width: training images are resized to fit, times that factor, and cut where larger; empty = no crop"""
    crop_least_area: Fraction = 0.0
    """a box of which the crop leaves a smaller part of its area is no target; 0 = those that are cut off whole"""
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
    """increasing lengths in pixels: an edge is rounded up to the next of them, if there is one; a few for --compile"""
    cache: Literal["none", "decoded", "resized"] = "none"
    """keep training images as files of raw pixels, decoded or already resized (one size an image only); same result"""
    cache_folder: str = "data/cache"
    """folder of the cached images, which may be shared and may be deleted at any time"""
    cache_gib: NotNegativeNumber = 50.0
    """largest size of the cache in GiB; the first images of the data set are kept, as many as fit"""


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
    """decay per step of the first and the second moment of the gradient, for adamw and lamb"""
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
    """AGVM: a rate for each module, by how far the gradients of the halves of a mini-batch agree; sgd, adamw only"""
    ema_decay: float = 0.0
    """decay per step of an exponential moving average of weights and buffers, which is evaluated instead; 0 = none"""


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
    """what policy step multiplies the rate by, one factor for each milestone"""
    warmup: Literal["linear", "exponential"] = "linear"
    """the rate rises by the same amount every step, or by the same factor; the latter needs warmup_start above 0"""
    warmup_steps: NotNegative = 500
    """steps of warmup. Not in the paper, which gives no number: 500 is ours"""
    warmup_start: NotNegativeNumber = 1.0
    """the warmup starts at this times base_lr (the paper's r), never above its end; with 1, 16 images have no warmup"""


@dataclass(frozen=True)
class Watch:
    """What happens when a training diverges. An update that is not finite or explodes is never applied."""

    action: WatchAction = "stop"
    """stop the run, skip the update, or roll back to the last checkpoint and warm the rate up again"""
    explodes_at: NotNegativeNumber = 100.0
    """a gradient explodes above so many times the median norm of the last updates; 0 = only when it is not finite"""
    window: AtLeastOne = 50
    """updates whose norms make that median; as long as there are fewer, nothing explodes"""
    most_skipped: NotNegative = 20
    """with skip: updates of the run that may be left out; one more stops it"""
    most_roll_backs: NotNegative = 3
    """with roll_back: how often the run may go back; once more stops it"""
    rewarm_steps: AtLeastOne = 100
    """steps in which the rate rises to the scheduled one after a roll-back, twice as many after each further one"""


@dataclass(frozen=True)
class Evaluation:
    """When and how the detector is evaluated while it trains."""

    every_epochs: NotNegative = 1
    """epochs between evaluations; 0 = only at the end"""
    batch_size: AtLeastOne = 8
    """images that share one forward, at most; each is on the canvas of its own size"""
    scales: tuple[int, ...] = ()
    """lengths in pixels of the shorter edge at which every image is looked at; empty = the last of data.short_edges"""
    flip: bool = False
    """look at every image mirrored left to right too, at every scale"""
    object_ranges: tuple[tuple[float, float], ...] = ()
    """for each scale from which to which size of an object, the root of its area in pixels of the file, it counts"""
    merge: MergeKind = "vote"
    """how the detections of several looks become one: vote, nms, soft-nms, gaussian-soft-nms or wbf"""
    merge_iou: Fraction = 0.5
    """detections of one class that overlap more are one object"""
    vote_iou: Fraction = 0.5
    """with merge vote: those that overlap the best one at least so much vote for its place"""
    merged_detections: AtLeastOne = 100
    """detections an image that are left of several looks"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of what cannot be."""
        if min(self.scales, default=1) < 1 or len({*self.scales}) < len(self.scales):
            yield "scales", "they must be positive lengths, each once"
        if self.object_ranges and len(self.object_ranges) != max(1, len(self.scales)):
            yield "object_ranges", f"it must have a range for each of the {max(1, len(self.scales))} scales"
        for low, high in self.object_ranges:
            if not 0 <= low < high < math.inf:
                yield "object_ranges", "a range is two sizes that rise; a very large one, such as 1e5, is no bound"
        if self.object_ranges and self.merge == "wbf":
            yield "merge", "wbf lowers the score of what some looks do not count (object_ranges): choose vote"


@dataclass(frozen=True)
class Recipe:
    """A training run, told in images."""

    batch_size: AtLeastOne = 16
    """images per optimizer step, over all devices and accumulation (the paper's mini-batch size)"""
    bn_size: NotNegative = 16
    """images whose pixels share one set of batch-norm statistics (the paper's BN size); 0 = frozen statistics"""
    group_size: AtLeastOne = 2
    """images padded to one common canvas where bn_size is 0; otherwise bn_size images are"""
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
    """epochs between checkpoints; an epoch that is evaluated always has one"""
    checkpoint_steps: NotNegative = 0
    """steps between checkpoints, beside those of epochs; 0 = none"""
    checkpoint_minutes: NotNegativeNumber = 20.0
    """minutes between checkpoints, beside those of epochs and steps; 0 = none"""
    keep_checkpoints: AtLeastOne = 2
    """newest checkpoints that are kept"""
    keep_best: bool = True
    """keep the checkpoint with the highest mmAP of boxes too"""
    keep_every_epochs: NotNegative = 0
    """keep the checkpoint of every so many epochs too; 0 = none"""
    start_from: str = ""
    """folder of another run to start from its newest weights; class layers start anew where classes differ"""
    trackers: tuple[str, ...] = ()
    """also send metrics, recipe and pictures to these: tensorboard, wandb, mlflow, trackio (docs/training.md)"""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=FasterRcnn)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    watch: Watch = field(default_factory=Watch)
    evaluation: Evaluation = field(default_factory=Evaluation)

    @property
    def images_per_group(self) -> int:
        """Images normalised together and padded to one canvas: bn_size, or group_size where statistics are frozen."""
        return self.bn_size or self.group_size

    @property
    def groups_per_step(self) -> int:
        """Groups of a mini-batch."""
        return self.batch_size // self.images_per_group
