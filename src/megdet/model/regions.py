"""Regions around a RoI, whose features help to say what it shows (Gidaris and Komodakis, 2015; Li et al., 2017)."""

from jaxtyping import Float, Int64
from torch import Tensor

from megdet.architecture_heads import REGIONS
from megdet.ops.boxes import clip_boxes
from megdet.ops.constants import constant

_WHERE = {
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "upper": (0.0, 0.0, 1.0, 0.5),
    "lower": (0.0, 0.5, 1.0, 1.0),
    "center": (0.25, 0.25, 0.75, 0.75),
    "enlarged": (-0.4, -0.4, 1.4, 1.4),
}
"""Regions as x1, y1, x2, y2, in widths and heights of the RoI from its upper left corner. The halves, the centre (half
as wide and high) and the factor 1.8 of the enlarged box are those of Gidaris and Komodakis."""
assert tuple(_WHERE) == REGIONS


def region_boxes(
    name: str, rois: Float[Tensor, "images rois 4"], sizes: Int64[Tensor, "images 2"]
) -> Float[Tensor, "images rois 4"]:
    """The named region of each RoI, clipped to the image, so that the canvas around it is not pooled.

    Differs from Gidaris and Komodakis: the enlarged box includes the RoI, without a hole in its place.
    """
    where = constant(_WHERE[name], rois.dtype, rois.device)
    low, edges = rois[..., :2].repeat(1, 1, 2), (rois[..., 2:] - rois[..., :2]).repeat(1, 1, 2)
    return clip_boxes(low + edges * where, sizes)
