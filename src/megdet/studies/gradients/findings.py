"""The findings of `megdet analyse variance`, as numbers and for JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from megdet.studies.gradients.statistics import Estimate, NoiseEstimate


@dataclass(frozen=True)
class Level:
    """Mini-batches of k N images."""

    factor: int
    """k"""
    batch: int
    """images of a mini-batch"""
    batches: int
    """the number of disjoint mini-batches that were measured"""
    variance: Estimate
    """variance of the gradient, summed over the parameters"""
    of_law: Estimate
    """k times the variance, divided by that of the smallest mini-batch: 1 under the 1/N law"""


@dataclass(frozen=True)
class Update:
    """k updates of rate r from N images each, compared with one update of rate k r from the same images."""

    factor: int
    updates: int
    """number of measurements of each kind"""
    small: Estimate
    """variance of the sum of k successive small updates, summed over the parameters"""
    large: Estimate
    """variance of the large update"""
    ratio: Estimate
    """variance of the large update over that of the small ones: 1 under Eq. 4"""
    law: float
    """k r^2 times the variance of the gradient of N images, as in Eq. 4"""
    distance: float
    """root mean square of |small - large| / |large|: the error of assuming equal updates"""


@dataclass(frozen=True)
class ModuleVariance:
    """The measurements of one module's gradient, or of the whole model's."""

    name: str
    title: str
    """name of the module in tables and pictures"""
    parameters: int
    levels: tuple[Level, ...]
    updates: tuple[Update, ...]
    two_batches: NoiseEstimate
    direct: NoiseEstimate

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = asdict(self) | {"two_batches": self.two_batches.as_dict(), "direct": self.direct.as_dict()}
        return {key: value for key, value in own.items() if key != "title"}


@dataclass(frozen=True)
class Variance:
    """All findings of `megdet analyse variance`."""

    run: str
    step: int
    unit: str
    """image or group"""
    unit_images: int
    images: int
    """the number of different images"""
    blocks: int
    """number of blocks of images; the errors come from leaving out one at a time"""
    rate: float
    """r"""
    optimizer: str
    """optimizer of the run; the updates are of plain SGD"""
    scheduled_rate: float
    """the run's own rate in the last step before these weights"""
    overrides: dict[str, Any]
    """keys in which the measured recipe differs from the run's"""
    modules: tuple[ModuleVariance, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "modules": [module.as_dict() for module in self.modules], "remark": self.remark}

    @property
    def changes(self) -> str:
        """The changed keys of the recipe, for a title; empty without changes."""
        return "".join(f", {key} {value}" for key, value in self.overrides.items())

    @property
    def rates(self) -> str:
        """The rate of the updates and the run's own, in a sentence."""
        sgd = "" if self.optimizer == "sgd" else f" Updates are of plain SGD, while the run used {self.optimizer}."
        return f"Rate r {self.rate:.4g}; the run's own at step {self.step} was {self.scheduled_rate:.4g}.{sgd}"

    @property
    def remark(self) -> str:
        """How the sampling unit affects the numbers."""
        if self.unit == "image":
            return "Unit: the image. Images do not interact in the forward, so each has a gradient of its own."
        return (
            f"Unit: the group of {self.unit_images} images. They share batch statistics, so a single image has no "
            "gradient of its own: the gradient of a group is not the mean of its images' gradients under other "
            f"statistics, and another bn_size is another function. The law holds between groups at bn_size "
            f"{self.unit_images}; noise scales count a group as {self.unit_images} images. Effects of sharing: the "
            f"variance counted for an image is its own plus {self.unit_images - 1} times the covariance that shared "
            "statistics cause between two images of a group, and the mean is that of groups of this size, which "
            "differs from the mean of larger groups."
        )
