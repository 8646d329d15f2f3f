"""The recipe: every key of a training run, its default and its meaning, on one page.

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
"""The trackers that `trackers` may name."""
MOST_EXACT_IMAGES = 4096
"""The most images of a mini-batch whose gradients are summed in fixed point (`exact`): more could wrap."""
MergeKind = Literal["vote", "nms", "soft-nms", "gaussian-soft-nms", "wbf"]


@dataclass(frozen=True)
class Data:
    """Where the images are and how they are prepared."""

    train_annotations: str = "data/coco/annotations/instances_train2017.json"
    """COCO instances file to train on; a relative path counts from the working directory"""
    train_images: str = "data/coco/train2017"
    """folder of the training images, or its address: https://, s3://, gs://, zip:// or any that fsspec knows"""
    val_annotations: str = "data/coco/annotations/instances_val2017.json"
    """COCO instances file to evaluate on"""
    val_images: str = "data/coco/val2017"
    """folder of the validation images, or its address"""
    draw_demo: Literal["", "easy", "hard", "tiny"] = ""
    """if not empty and the annotations are missing, draw the demo data set into the folder above them"""
    keep_empty_images: bool = False
    """also train on images without boxes"""
    repeat_threshold: Fraction = 0.0
    """images of classes that are in less than this part of the images come more often (LVIS's t); 0 = all alike"""
    image_weights: str = ""
    """CSV file with columns file_name and weight: how often a training image comes; 0 leaves it out; empty = alike"""
    allow_outside_files: bool = False
    """read images whose file_name is absolute or has .. in it, so that an annotation file may name any file"""
    unreadable: Literal["stop", "replace"] = "stop"
    """if a training image is lost or damaged: stop the run, or replace the image by the next one of the plan"""
    most_replaced: Fraction = 0.01
    """with unreadable replace: part of the training images that may be lost before the run stops (at least one)"""
    max_pixels: AtLeastOne = 80_000_000
    """largest height x width, in pixels of the file, of an image that is decoded"""
    short_edges: tuple[int, ...] = (800,)
    """lengths in pixels of the shorter edge; each training group draws one, evaluation uses the last"""
    max_long_edge: AtLeastOne = 1333
    """largest length in pixels of the longer edge after resizing (times the factor of scale_jitter)"""
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    """each training group draws a factor between these two and multiplies its size by it"""
    scale_law: ScaleLaw = "logarithm"
    """what is drawn uniformly for scale_jitter: the factor's logarithm, or the factor (as in large-scale jitter)"""
    crop: tuple[int, ...] = ()
    """height and width: training images are resized to fit, times scale_jitter's factor, then cut; empty = no crop"""
    crop_probability: Fraction = 0.0
    """probability that a part of a training image is used instead of all of it, resized like the whole image"""
    crop_scales: tuple[float, float] = (0.5, 1.0)
    """with crop_probability: the part's height and width are those of the image times a factor between these two"""
    crop_least_area: Fraction = 0.0
    """a box is a target only if crop, crop_scales and mosaic leave this part of its area at least; 0 = any part"""
    resize: ResizeKind = "antialias"
    """antialias = bilinear as in Pillow, sizes rounded; torchvision = as its detectors: no antialias, rounded down"""
    horizontal_flip: Fraction = 0.5
    """probability of mirroring a training image left to right"""
    vertical_flip: Fraction = 0.0
    """probability of mirroring a training image top to bottom"""
    color_jitter: NotNegativeNumber = 0.0
    """strength of random brightness, contrast and saturation of a training image; 0.4 is strong"""
    canvas_multiple: AtLeastOne = 32
    """a group's canvas is rounded up to a multiple of this many pixels"""
    canvas_edges: tuple[int, ...] = ()
    """rising lengths in pixels: a canvas edge is rounded up to the next one, if there is one; give few for --compile"""
    mosaic: Fraction = 0.0
    """probability that a training picture is made of four images, drawn by the plan, each in a quarter of it"""
    copy_paste: Fraction = 0.0
    """probability that objects of another image, drawn by the plan, are pasted onto a training image"""
    paste_least_area: Fraction = 0.1
    """with copy_paste, an object is a target only if at least this part of it is seen; 0 = any part"""
    cache: Literal["none", "decoded", "resized"] = "none"
    """keep training images as files of raw pixels, decoded or also resized (if an image has one size); same result"""
    cache_folder: str = "data/cache"
    """folder of the cached images, which may be shared and may be deleted at any time"""
    cache_gib: NotNegativeNumber = 50.0
    """largest size of the cache in GiB; as many of the first images of the data set as fit are kept"""
    far_cache_gib: NotNegativeNumber = 50.0
    """largest size in GiB of the copies of far images' files, in cache_folder/files; 0 = none; same result"""
    far_timeout: NotNegativeNumber = 30.0
    """seconds that a request for a far image may take"""
    far_retries: NotNegative = 4
    """how often a request for a far image is made again after a fault that may pass"""


@dataclass(frozen=True)
class Optimizer:
    """The optimizer, and the learning rate for 16 images."""

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
    """added by adamw and lamb to the root of the second moment; LAMB's authors take 1e-6"""
    trust_coefficient: float = 1e-3
    """eta of lars: its local rate is eta * |weights| / (|gradient| + weight_decay * |weights|)"""
    weight_decay: NotNegativeNumber = 1e-4
    """lambda of Eq. 1: part of the gradient in sgd and lars, decoupled from it in adamw and lamb"""
    decay_norm_and_bias: bool = True
    """also decay the weights of norm layers and all biases; turn off when batch norm is trained from scratch"""
    clip_norm: NotNegativeNumber = 0.0
    """largest norm of the whole gradient; 0 = no clipping"""
    agvm: bool = False
    """AGVM: a rate for each module, by how well the gradients of the halves of a mini-batch agree; sgd, adamw only"""
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
    """factors by which policy step multiplies the rate, one for each milestone"""
    warmup: Literal["linear", "exponential"] = "linear"
    """the rate rises by the same amount every step, or by the same factor (needs warmup_start above 0)"""
    warmup_steps: NotNegative = 500
    """steps of warmup; the paper gives no number, 500 is our choice"""
    warmup_start: NotNegativeNumber = 1.0
    """the warmup starts at this times base_lr (the paper's r), at most at its end; with 1, 16 images have no warmup"""


@dataclass(frozen=True)
class Watch:
    """What happens when a training diverges. An update that is not finite or explodes is never applied."""

    action: WatchAction = "stop"
    """stop the run, skip the update, or roll back to the last checkpoint and warm the rate up again"""
    explodes_at: NotNegativeNumber = 100.0
    """a gradient norm above this times the median of the last updates counts as diverged; 0 = only if not finite"""
    window: AtLeastOne = 50
    """number of updates for the median of explodes_at; before so many, only a norm that is not finite counts"""
    most_skipped: NotNegative = 20
    """with skip: number of updates that may be left out in a run; one more stops it"""
    most_roll_backs: NotNegative = 3
    """with roll_back: number of roll-backs in a run; one more stops it"""
    rewarm_steps: AtLeastOne = 100
    """steps in which the rate rises to the schedule after a roll-back, doubled after each further roll-back"""


@dataclass(frozen=True)
class Evaluation:
    """When and how the detector is evaluated while it trains."""

    every_epochs: NotNegative = 1
    """epochs between evaluations; 0 = only at the end"""
    batch_size: AtLeastOne = 8
    """largest number of images in a forward, on a CPU in all forwards at a time if the images are large"""
    scales: tuple[int, ...] = ()
    """lengths in pixels of the shorter edge at which images are evaluated; empty = the last of data.short_edges"""
    flip: bool = False
    """evaluate every image also mirrored left to right, at every scale"""
    object_ranges: tuple[tuple[float, float], ...] = ()
    """for each scale the smallest and largest size (root of the area, in pixels of the file) of its detections"""
    merge: MergeKind = "vote"
    """how detections at several scales are merged: vote, nms, soft-nms, gaussian-soft-nms or wbf"""
    merge_iou: Fraction = 0.5
    """detections of one class with a larger IoU than this are one object when merged"""
    vote_iou: Fraction = 0.5
    """with merge vote: detections with at least this IoU with the best one vote for its box"""
    merged_detections: AtLeastOne = 100
    """detections an image that are kept after merging"""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        if min(self.scales, default=1) < 1 or len({*self.scales}) < len(self.scales):
            yield "scales", "they must be positive lengths, each once"
        if self.object_ranges and len(self.object_ranges) != max(1, len(self.scales)):
            yield "object_ranges", f"it must have a range for each of the {max(1, len(self.scales))} scales"
        for low, high in self.object_ranges:
            if not 0 <= low < high < math.inf:
                yield "object_ranges", "a range is two sizes that rise; a very large one, such as 1e5, is no bound"
        if self.object_ranges and self.merge == "wbf":
            yield "merge", "wbf lowers the scores of detections that object_ranges leaves out at a scale: choose vote"


@dataclass(frozen=True)
class Recipe:
    """A training run, counted in images."""

    batch_size: AtLeastOne = 16
    """images per optimizer step, over all devices and accumulation (the paper's mini-batch size)"""
    bn_size: NotNegative = 16
    """images whose pixels share one set of batch-norm statistics (the paper's BN size); 0 = frozen statistics"""
    group_size: AtLeastOne = 2
    """images padded to one common canvas if bn_size is 0; otherwise bn_size images are"""
    plan_window: AtLeastOne = 4
    """mini-batches within which images of similar aspect ratio are put into one group"""
    precision: Precision = "float32"
    """arithmetic of convolutions and matrix products; tf32 (on a CPU float32) and bfloat16 keep weights in float32"""
    exact: bool = False
    """the same bits on any number of devices of one kind: each image is computed apart, sums are integers (slower)"""
    recompute: RecomputePlan = "none"
    """save memory: recompute the inside of each block, stage or series of blocks in the backward; the same result"""
    noise_interval: NotNegative = 0
    """steps from one measurement of the gradient noise scale to the next; 0 = none"""
    seed: NotNegative = 0
    """the one seed of weights, order, augmentation and sampling"""
    checkpoint_epochs: AtLeastOne = 1
    """epochs between checkpoints; an epoch that is evaluated always has one"""
    checkpoint_steps: NotNegative = 0
    """steps between checkpoints, in addition to those of epochs; 0 = none"""
    checkpoint_minutes: NotNegativeNumber = 20.0
    """minutes between checkpoints, in addition to those of epochs and steps; 0 = none"""
    keep_checkpoints: AtLeastOne = 2
    """number of newest checkpoints to keep"""
    keep_best: bool = True
    """also keep the checkpoint with the highest mmAP of boxes"""
    keep_every_epochs: NotNegative = 0
    """also keep the checkpoint of every so many epochs; 0 = none"""
    ledger_steps: NotNegative = 200
    """steps between lines of ledger.jsonl, digests of all state by which megdet audit checks a run; 0 = no ledger"""
    start_from: str = ""
    """run folder whose newest weights the run starts from; class layers get random weights if classes differ"""
    trackers: tuple[str, ...] = ()
    """send metrics, recipe and pictures to these: tensorboard, wandb, mlflow, trackio (docs/training.md)"""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=FasterRcnn)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    watch: Watch = field(default_factory=Watch)
    evaluation: Evaluation = field(default_factory=Evaluation)

    @property
    def images_per_group(self) -> int:
        """Images normalised together and padded to one canvas: bn_size, or group_size if statistics are frozen."""
        return self.bn_size or self.group_size

    @property
    def groups_per_step(self) -> int:
        """Groups of a mini-batch."""
        return self.batch_size // self.images_per_group
