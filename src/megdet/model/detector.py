"""The base class of detectors. A detector names its own parts, so that no code outside `model` has to know them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor, nn

from megdet.architecture import Model
from megdet.distributed.lane import Lane
from megdet.layers.recompute import plainly, recompute
from megdet.model.backbone import Backbone
from megdet.ops.constants import constant
from megdet.recipe import RecomputePlan
from megdet.structures import Batch, BatchDetections, Targets

BACKBONE_MEANING = (
    *("mean", "std", "backbone.name", "backbone.last_convolution", "backbone.norm_eps", "backbone.output_stride"),
    *("backbone.stride_in_1x1", "backbone.deformable_stages", "backbone.deformable_modulated"),
)
"""The keys within `recipe.model` that change the features of a backbone with the same weights."""


@dataclass(frozen=True)
class Count:
    """A number that a forward returns besides its losses: how many samples of a loss are positive."""

    name: str
    """its name in the result of a forward and in metrics.jsonl"""
    sample: str
    """what is sampled, in the singular, such as anchor"""
    out_of: str = ""
    """the key within `recipe.model` of the number of samples an image; empty if the count is a fraction already"""

    def out_of_samples(self, architecture: Model) -> float:
        """How many samples an image has; 1 if the count is a fraction already."""
        return float(value_of(architecture, self.out_of)) if self.out_of else 1.0

    def ratio(self, value: float, architecture: Model) -> float:
        """The fraction of the samples that is positive, 0 to 1."""
        return value / self.out_of_samples(architecture)


@dataclass
class Samples:
    """The boxes that a loss is computed on, for pictures; in pixels of the canvas."""

    boxes: Float[Tensor, "images samples 4"]
    is_positive: Bool[Tensor, "images samples"]
    is_valid: Bool[Tensor, "images samples"]


class Detector(nn.Module, ABC):
    """A detector for training and detection. It is given its lane and knows nothing else about devices.

    Class attributes say what a kind of detector is made of; an instance whose recipe adds a part overrides them.
    Building a detector reads no file.

    Args:
        architecture: `recipe.model`.
        num_classes: without the background.
        lane: the ranks that share batch statistics; None = frozen statistics.
        recompute_plan: what the backward computes again instead of keeping it in memory.
    """

    loss_names: tuple[str, ...]
    """the terms of l(x, w) in Eq. 1"""
    counts: ClassVar[tuple[Count, ...]] = ()
    """the counts that a forward returns besides the losses, in the order of the stages; Table 1 uses the last"""
    has_masks: ClassVar[bool] = False
    """whether it learns from masks, which the data must then have, and finds masks"""
    parts: Mapping[str, str]
    """modules and their titles in pictures: the parts for AGVM, the noise scale and the variance of gradients"""
    reference_part: ClassVar[str] = "backbone"
    """the part with whose gradient variance AGVM compares the other parts"""
    dense_parts: tuple[str, ...] = ()
    """the parts whose arithmetic is the same for all images of a canvas, so that they can be compiled"""
    class_layers: tuple[str, ...]
    """the layers with a row for each class; fine-tuning on other classes starts them with new weights"""
    small_start: Mapping[str, float] = {}
    """layers with initial weights near 0, and the factor by which `verify` enlarges them so that errors show"""
    same_meaning: ClassVar[tuple[str, ...]]
    """the keys within `recipe.model` that change what a detector with the same weights computes"""
    map_norms: ClassVar[tuple[str, ...]] = ("backbone", "fpn")
    """the sections whose norm layers get one feature map at a time, which must have more than one value"""
    sampling_keys: ClassVar[tuple[str, ...]] = ()
    """the keys within `recipe.model` that decide what is sampled: counts of runs compare only if these are equal"""
    equal_variants: ClassVar[Mapping[str, tuple[str, Callable[[Any], Model]]]] = {}
    """other ways to compute the same result, by case of `verify`: a description, and the changed `recipe.model`"""

    def __init__(
        self, architecture: Model, num_classes: int, lane: Lane | None, recompute_plan: RecomputePlan = "none"
    ) -> None:
        super().__init__()
        self.architecture, self.num_classes = architecture, num_classes
        self.backbone = Backbone(architecture.backbone, lane, recompute_plan)
        self.recompute = recompute if recompute_plan != "none" else plainly
        self._recompute_plan = recompute_plan
        self.compiled: dict[str, Callable[..., Any]] = {}
        """compiled functions of dense parts, which training calls instead of their forward"""

    @property
    def exact_paste(self) -> bool:
        """Whether masks are pasted at the exact boxes, not at boxes rounded to whole pixels."""
        return True

    def set_recompute(self, plan: RecomputePlan) -> None:
        """Change what is recomputed, from the next forward on.

        Raises InputError for a backbone that is not a sequence of blocks.
        """
        if plan != self._recompute_plan:
            self.backbone.set_recompute(plan)
            self.recompute, self._recompute_plan = recompute if plan != "none" else plainly, plan

    def reported(self) -> tuple[str, ...]:
        """The keys in the result of a forward: losses, then counts."""
        return (*self.loss_names, *(count.name for count in self.counts))

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, " images"]]:
        """Every loss of each image, and the counts; in training mode."""
        return self.losses(self.normalized(batch.pixels, batch.sizes), batch.sizes, batch.targets)

    def normalized(
        self,
        pixels: UInt8[Tensor, "images 3 height width"] | Float32[Tensor, "images 3 height width"],
        sizes: Int64[Tensor, "images 2"],
    ) -> Float[Tensor, "images 3 height width"]:
        """Subtract the mean, divide by the deviation, and set the canvas outside each image to 0."""
        dtype = next(self.parameters()).dtype
        mean = constant(self.architecture.mean, dtype, pixels.device).reshape(3, 1, 1) * 255
        std = constant(self.architecture.std, dtype, pixels.device).reshape(3, 1, 1) * 255
        y = torch.arange(pixels.shape[2], device=pixels.device).reshape(1, -1, 1) < sizes[:, :1].unsqueeze(2)
        x = torch.arange(pixels.shape[3], device=pixels.device).reshape(1, 1, -1) < sizes[:, 1:].unsqueeze(2)
        images = (pixels.to(dtype) - mean) / std * (y & x).unsqueeze(1)
        return images.contiguous(memory_format=torch.channels_last)

    @abstractmethod
    def features(self, images: Float[Tensor, "images 3 height width"]) -> list[Float[Tensor, "images _ _ _"]]:
        """The feature maps of normalised images, the finest first."""

    @abstractmethod
    def losses(
        self,
        images: Float[Tensor, "images 3 height width"],
        sizes: Int64[Tensor, "images 2"],
        targets: Targets,
    ) -> dict[str, Float[Tensor, " images"]]:
        """The losses and counts of normalised images, by name."""

    @abstractmethod
    def detect(
        self, images: Float[Tensor, "images 3 height width"], sizes: Int64[Tensor, "images 2"]
    ) -> BatchDetections:
        """The detections on normalised images; in evaluation mode."""

    @abstractmethod
    def samples(
        self, images: Float[Tensor, "images 3 height width"], sizes: Int64[Tensor, "images 2"], targets: Targets
    ) -> Samples:
        """The boxes on which the last loss of normalised images is computed."""

    def dense_part(self, name: str) -> Callable[..., Any]:
        """A dense part; in training mode its compiled form, if there is one."""
        part: nn.Module = getattr(self, name)
        return self.compiled.get(name, part) if self.training else part


def value_of(architecture: Model, key: str) -> Any:
    """The value of a dotted key within `recipe.model`."""
    value: Any = architecture
    for name in key.split("."):
        value = getattr(value, name)
    return value
