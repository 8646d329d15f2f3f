"""What all detectors have in common, and what each says of itself: nobody outside `model` spells a part's name."""

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
"""The keys, within `recipe.model`, without which the same weights of a backbone mean other features."""


@dataclass(frozen=True)
class Count:
    """A number that a forward counts beside its losses: how many of the samples of a loss are positive."""

    name: str
    """in the result of a forward and in metrics.jsonl"""
    sample: str
    """what is sampled, in the singular: anchor"""
    out_of: str = ""
    """the key, within `recipe.model`, of how many of them an image has; empty where it is a part of 1 already"""

    def out_of_samples(self, architecture: Model) -> float:
        """How many samples an image has; 1 where the number is a part of 1 already."""
        return float(value_of(architecture, self.out_of)) if self.out_of else 1.0

    def ratio(self, value: float, architecture: Model) -> float:
        """The part of the samples that is positive, of 1."""
        return value / self.out_of_samples(architecture)


@dataclass
class Samples:
    """The boxes that a loss looks at, for pictures; in pixels of the canvas."""

    boxes: Float[Tensor, "images samples 4"]
    is_positive: Bool[Tensor, "images samples"]
    is_valid: Bool[Tensor, "images samples"]


class Detector(nn.Module, ABC):
    """A detector for training and detection. It is given its lane and asks nothing else about devices.

    A kind of detector says by class attributes what it is made of, and one whose recipe adds a part says so by its
    own. Building one reads no file.

    Args:
        architecture: `recipe.model`.
        num_classes: without the background.
        lane: the ranks that share batch statistics; None = the statistics are fixed.
        recompute_plan: what the backward computes again instead of keeping it.
    """

    loss_names: tuple[str, ...]
    """the terms of l(x, w) in Eq. 1"""
    counts: ClassVar[tuple[Count, ...]] = ()
    """what a forward returns beside them, in the order of the stages; Table 1 is about the last"""
    has_masks: ClassVar[bool] = False
    """whether it learns from masks, which the data must then have, and finds some"""
    parts: Mapping[str, str]
    """its modules and what a picture calls them: for AGVM, the noise scale and the variance of gradients"""
    reference_part: ClassVar[str] = "backbone"
    """the part beside whose gradients AGVM sees those of the others"""
    dense_parts: tuple[str, ...] = ()
    """the parts whose forward does the same arithmetic for every image of a canvas, so that it can be compiled"""
    class_layers: tuple[str, ...]
    """the layers whose rows are classes; they start anew when the classes are others"""
    small_start: Mapping[str, float] = {}
    """layers whose weights begin near 0, with the factor at which `verify` sees what depends on them"""
    same_meaning: ClassVar[tuple[str, ...]]
    """the keys, within `recipe.model`, without which the same weights mean another detector"""
    map_norms: ClassVar[tuple[str, ...]] = ("backbone", "fpn")
    """the sections whose norm layers see one feature map at a time, which must have more than one value"""
    sampling_keys: ClassVar[tuple[str, ...]] = ()
    """the keys, within `recipe.model`, that say what is sampled: runs whose counts compare have the same"""
    equal_variants: ClassVar[Mapping[str, tuple[str, Callable[[Any], Model]]]] = {}
    """other ways to compute the same, by the name of a case of `verify`: what it is, and the changed `recipe.model`"""

    def __init__(
        self, architecture: Model, num_classes: int, lane: Lane | None, recompute_plan: RecomputePlan = "none"
    ) -> None:
        super().__init__()
        self.architecture, self.num_classes = architecture, num_classes
        self.backbone = Backbone(architecture.backbone, lane, recompute_plan)
        self.recompute = recompute if recompute_plan != "none" else plainly
        self._recompute_plan = recompute_plan
        self.compiled: dict[str, Callable[..., Any]] = {}
        """what training calls instead of the forward of some of the dense parts"""

    @property
    def exact_paste(self) -> bool:
        """Whether its masks go into an image where their boxes are, not where these are in whole pixels."""
        return True

    def set_recompute(self, plan: RecomputePlan) -> None:
        """Change what the backward computes again instead of keeping it, from the next forward on.

        Raises InputError for a backbone that is no sequence of blocks.
        """
        if plan != self._recompute_plan:
            self.backbone.set_recompute(plan)
            self.recompute, self._recompute_plan = recompute if plan != "none" else plainly, plan

    def reported(self) -> tuple[str, ...]:
        """The names in the result of a forward: losses, then counts."""
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
        """What is on normalised images; in evaluation mode."""

    @abstractmethod
    def samples(
        self, images: Float[Tensor, "images 3 height width"], sizes: Int64[Tensor, "images 2"], targets: Targets
    ) -> Samples:
        """The boxes that the last loss of normalised images looks at."""

    def dense_part(self, name: str) -> Callable[..., Any]:
        """A dense part, or what it was compiled to where the detector is in training mode."""
        part: nn.Module = getattr(self, name)
        return self.compiled.get(name, part) if self.training else part


def value_of(architecture: Model, key: str) -> Any:
    """The value of a dotted key within `recipe.model`."""
    value: Any = architecture
    for name in key.split("."):
        value = getattr(value, name)
    return value
