"""The architecture of a detector, `recipe.model`: a dataclass for each kind of detector."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from megdet.architecture_heads import BoxHead, Cascade, MaskHead, PositionSensitiveHead
from megdet.architecture_parts import (
    Anchors,
    AtrousBackbone,
    Backbone,
    DenseHead,
    Fpn,
    NormKind,
    OctaveAnchors,
    Rpn,
    Segmentation,
    SingleLevelAnchors,
    StridedFpn,
)

MaskUse = Literal["none", "any", "all"]
"""Which masks a detector learns from: none, any that the data have, or all (every object must have one)."""


@dataclass(frozen=True)
class Model:
    """The architecture of a detector, without its classes. Each kind of detector has a subclass."""

    kind: str
    """which detector it is"""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """mean of red, green and blue that is subtracted; pixels are 0 to 1"""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """standard deviation of red, green and blue, by which they are divided"""
    backbone: Backbone = field(default_factory=Backbone)

    @property
    def norms(self) -> dict[str, NormKind]:
        """The kind of norm layer of each section; sections of parts that are turned off have none."""
        return {
            name: section.norm
            for name, section in vars(self).items()
            if hasattr(section, "norm") and getattr(section, "enabled", True)
        }

    def with_norms(self, norms: Mapping[str, NormKind]) -> "Model":
        """A copy with other norm layers in some sections."""
        return replace(self, **{name: replace(getattr(self, name), norm=norm) for name, norm in norms.items()})

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, why) of every invalid value."""
        if min(self.std) <= 0:
            yield "std", "every value must be positive"


@dataclass(frozen=True)
class TwoStage(Model):
    """A two-stage detector: proposals from a feature pyramid, then a head for each proposal."""

    fpn: Fpn = field(default_factory=Fpn)
    anchors: Anchors = field(default_factory=Anchors)
    rpn: Rpn = field(default_factory=Rpn)
    box_head: BoxHead = field(default_factory=BoxHead)
    segmentation: Segmentation = field(default_factory=Segmentation)


@dataclass(frozen=True)
class FasterRcnn(TwoStage):
    """Faster R-CNN on a feature pyramid, the paper's detector (Sec. 4)."""

    kind: Literal["faster_rcnn"] = "faster_rcnn"
    """which detector it is; the other keys of the section are those of this kind"""


@dataclass(frozen=True)
class MaskRcnn(TwoStage):
    """Mask R-CNN: Faster R-CNN with a mask for every detection (He et al., 2017)."""

    kind: Literal["mask_rcnn"] = "mask_rcnn"
    """which detector it is; the other keys of the section are those of this kind"""
    mask_head: MaskHead = field(default_factory=MaskHead)


@dataclass(frozen=True)
class CascadeRcnn(TwoStage):
    """Cascade R-CNN: three box heads one after another, each trained for better boxes (Cai and Vasconcelos, 2018)."""

    kind: Literal["cascade_rcnn"] = "cascade_rcnn"
    """which detector it is; the other keys of the section are those of this kind"""
    cascade: Cascade = field(default_factory=Cascade)


@dataclass(frozen=True)
class CascadeMaskRcnn(TwoStage):
    """Cascade R-CNN with a mask for every detection (Cai and Vasconcelos, 2019)."""

    kind: Literal["cascade_mask_rcnn"] = "cascade_mask_rcnn"
    """which detector it is; the other keys of the section are those of this kind"""
    cascade: Cascade = field(default_factory=Cascade)
    mask_head: MaskHead = field(default_factory=MaskHead)


@dataclass(frozen=True)
class RetinaNet(Model):
    """RetinaNet (Lin et al., 2017): one stage, a score for each class at every anchor."""

    kind: Literal["retinanet"] = "retinanet"
    """which detector it is; the other keys of the section are those of this kind"""
    fpn: StridedFpn = field(default_factory=StridedFpn)
    anchors: OctaveAnchors = field(default_factory=OctaveAnchors)
    head: DenseHead = field(default_factory=DenseHead)


@dataclass(frozen=True)
class Rfcn(Model):
    """R-FCN (Dai et al., 2016): no layer after the pooling of the RoIs has weights."""

    kind: Literal["rfcn"] = "rfcn"
    """which detector it is; the other keys of the section are those of this kind"""
    backbone: AtrousBackbone = field(default_factory=AtrousBackbone)
    anchors: SingleLevelAnchors = field(default_factory=SingleLevelAnchors)
    rpn: Rpn = field(default_factory=Rpn)
    box_head: PositionSensitiveHead = field(default_factory=PositionSensitiveHead)


MODELS: dict[str, type[Model]] = {
    "faster_rcnn": FasterRcnn,
    "mask_rcnn": MaskRcnn,
    "cascade_rcnn": CascadeRcnn,
    "cascade_mask_rcnn": CascadeMaskRcnn,
    "retinanet": RetinaNet,
    "rfcn": Rfcn,
}
"""The kinds of detectors, by `model.kind`; `megdet.model.choice` has the detector of each."""
