"""Iterative box regression and box voting when testing (Gidaris and Komodakis, 2015, Sec. 4; the paper's [9]).

The second stage runs again on its own detections, each for its own class, several times if asked for. The boxes of all
passes go through NMS together, and boxes that overlap a survivor vote for its place.
Differs from the source, which runs again on all boxes and not only on those that survive NMS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megdet.model.proposals import Proposals
from megdet.model.roi_head import SMALLEST_DETECTION, RoiHead
from megdet.ops.box_voting import voted_boxes
from megdet.ops.boxes import clip_boxes, decode_boxes
from megdet.ops.nms import segmented_nms
from megdet.structures import BatchDetections

Looked = tuple[Float[Tensor, "images rois classes_and_background"], Float[Tensor, "images rois regressed 4"]]
Look = Callable[[Float[Tensor, "images rois 4"], Bool[Tensor, "images rois"]], Looked]
"""Runs a head on boxes: class probabilities, background last, and deltas; rows of invalid RoIs are meaningless."""


@torch.no_grad()
def detections_of_looks(
    head: RoiHead, look: Look, proposals: Proposals, sizes: Int64[Tensor, "images 2"]
) -> BatchDetections:
    """The detections of a second stage at the proposals, after the passes and the vote that its recipe asks for.

    Without these it is `head.detections` of one pass.
    """
    recipe = head.recipe
    scores, deltas = look(proposals.boxes, proposals.is_valid)
    if not recipe.test_iterations and not recipe.vote_iou:
        return head.detections(scores, deltas, proposals, sizes)
    found = _candidates(head, scores, deltas, proposals.boxes, proposals.is_valid.unsqueeze(2), sizes)
    best = _best(head, found, len(sizes))
    for _ in range(recipe.test_iterations):
        is_own = best.labels.unsqueeze(2) == torch.arange(head.num_classes, device=sizes.device)
        scores, deltas = look(best.boxes, best.labels >= 0)
        again = _candidates(head, scores, deltas, best.boxes, is_own, sizes)
        best = _best(head, again, len(sizes))
        found = found.joined(again)
    return _best(head, found, len(sizes), recipe.vote_iou)


@dataclass(frozen=True)
class _Candidates:
    """Boxes above the score threshold, one a row; the rows of an image are ordered by RoI, then class."""

    images: Int64[Tensor, " rows"]
    labels: Int64[Tensor, " rows"]
    boxes: Float[Tensor, "rows 4"]
    scores: Float[Tensor, " rows"]

    def joined(self, others: "_Candidates") -> "_Candidates":
        """These candidates followed by the others."""
        return _Candidates(*(torch.cat([own, vars(others)[name]]) for name, own in vars(self).items()))


def _candidates(
    head: RoiHead,
    scores: Tensor,
    deltas: Tensor,
    rois: Tensor,
    is_asked: Bool[Tensor, "images rois _"],
    sizes: Tensor,
) -> _Candidates:
    """The boxes above the score threshold of the classes in `is_asked`."""
    classes = head.num_classes
    boxes = clip_boxes(decode_boxes(deltas, rois.unsqueeze(2), head.delta_weights), sizes)
    boxes = boxes.expand(-1, -1, classes, -1)
    is_large = ((boxes[..., 2:] - boxes[..., :2]) >= SMALLEST_DETECTION).all(dim=3)
    own = scores[..., :classes]
    place = ((own > head.recipe.score_threshold) & is_large & is_asked).nonzero(as_tuple=True)
    return _Candidates(place[0], place[2], boxes[place], own[place])


def _best(head: RoiHead, found: _Candidates, num_images: int, vote_iou: float = 0.0) -> BatchDetections:
    """The best boxes of each image after NMS within each class, moved by box voting if asked for."""
    segments = found.images * head.num_classes + found.labels
    candidates = found.boxes, found.scores, segments
    keep = segmented_nms(*candidates, head.recipe.nms_iou)
    boxes = voted_boxes(*candidates, vote_iou) if vote_iou else found.boxes
    kept = keep.nonzero().flatten()
    kept = kept[found.scores[kept].argsort(descending=True, stable=True)]
    kept = kept[found.images[kept].argsort(stable=True)]
    image = found.images[kept]
    counts = torch.zeros(num_images, dtype=torch.int64, device=kept.device).scatter_add(0, image, torch.ones_like(kept))
    rank = torch.arange(len(kept), device=kept.device) - (counts.cumsum(0) - counts)[image]
    is_left = rank < head.recipe.detections
    place, kept = (image[is_left], rank[is_left]), kept[is_left]
    shape = num_images, head.recipe.detections
    result = BatchDetections(
        boxes.new_zeros(*shape, 4), boxes.new_zeros(shape), torch.full(shape, -1, device=boxes.device)
    )
    result.boxes[place], result.scores[place] = boxes[kept], found.scores[kept]
    result.labels[place] = found.labels[kept]
    return result
