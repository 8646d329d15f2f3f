"""Which detector a recipe asks for."""

from megdet.architecture import (
    CascadeMaskRcnn,
    CascadeRcnn,
    FasterRcnn,
    MaskRcnn,
    MaskUse,
    Model,
    RetinaNet,
    Rfcn,
    TwoStage,
)
from megdet.distributed.lane import SINGLE_LANE, Lane
from megdet.model import cascade_rcnn, faster_rcnn, mask_rcnn, retinanet, rfcn
from megdet.model.detector import Detector
from megdet.recipe import Recipe

DETECTORS: dict[type[Model], type[Detector]] = {
    FasterRcnn: faster_rcnn.FasterRcnn,
    MaskRcnn: mask_rcnn.MaskRcnn,
    CascadeRcnn: cascade_rcnn.CascadeRcnn,
    CascadeMaskRcnn: cascade_rcnn.CascadeMaskRcnn,
    RetinaNet: retinanet.RetinaNet,
    Rfcn: rfcn.Rfcn,
}
"""The detector of each kind of `recipe.model`."""


def detector_class(model: Model) -> type[Detector]:
    """The detector class for a `recipe.model`."""
    return DETECTORS[type(model)]


def mask_use(model: Model) -> MaskUse:
    """Which masks the detector of a `recipe.model` learns from."""
    if detector_class(model).has_masks:
        return "all"
    return "any" if isinstance(model, TwoStage) and model.segmentation.enabled else "none"


def make_detector(recipe: Recipe, num_classes: int, lane: Lane = SINGLE_LANE) -> Detector:
    """The detector of a recipe with random weights; it reads no file.

    `lane` is the ranks that share batch statistics. Raises InputError for a backbone that cannot be built.
    """
    detector = detector_class(recipe.model)
    return detector(recipe.model, num_classes, lane if recipe.bn_size else None, recipe.recompute)
