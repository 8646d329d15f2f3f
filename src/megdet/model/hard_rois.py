"""Online hard example mining (Shrivastava, Gupta and Girshick, 2016): the loss of an image is over its hardest RoIs.

The head runs on every proposal and on the ground truth; the RoIs of greatest loss (class plus box) are chosen in each
image, with no fixed fraction of positives. The order is total: greatest loss first, ties to the lower index, proposals
before ground truth.

If the RoIs of a head do not share batch statistics, the head runs on all RoIs without gradient and then, with gradient,
on the chosen ones, like the paper's two copies of the network with shared weights. Differs from the paper if RoIs share
batch statistics: the head then runs once, with gradient, on all RoIs. The statistics are those of all RoIs and are
updated once, and a chosen RoI has the loss that it was chosen by.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megdet.model.proposals import Proposals
from megdet.model.roi_head import Outputs, RoiHead, SampledRois
from megdet.ops.nms import segmented_nms
from megdet.ops.ordering import NEVER, score_keys, top
from megdet.structures import Targets


def choose_rois(
    head: RoiHead, look: Callable[[Tensor, Tensor], Outputs], proposals: Proposals, targets: Targets
) -> tuple[SampledRois, Outputs | None]:
    """The RoIs of a head's loss, and the head's outputs for them if they were computed already.

    Args:
        head: its recipe says whether RoIs are sampled at random or by their loss.
        look: runs the head on (boxes, is_valid).
        proposals: the proposals of the first stage.
        targets: the ground truth, which is added to the proposals.
    """
    if head.recipe.sampling == "random":
        return head.sample(proposals, targets), None
    candidates = head.candidates(proposals, targets)
    with torch.set_grad_enabled(torch.is_grad_enabled() and head.rois_share_statistics):
        logits, deltas = look(candidates.boxes, candidates.is_valid)
    recipe = head.recipe
    with torch.no_grad():
        classes, regression = head.terms(logits, deltas, candidates)
        index, is_valid = hardest(classes + regression, candidates, recipe.samples, recipe.hard_nms_iou)
    chosen = candidates.at(index, is_valid)
    if not head.rois_share_statistics:
        return chosen, None
    rows = index.unsqueeze(2)
    own_logits = logits.gather(1, rows.expand(-1, -1, logits.shape[2]))
    own_deltas = deltas.gather(1, rows.unsqueeze(3).expand(-1, -1, *deltas.shape[2:]))
    return chosen, (own_logits, own_deltas)


def hardest(
    losses: Float[Tensor, "images rois"], rois: SampledRois, count: int, nms_iou: float
) -> tuple[Int64[Tensor, "images chosen"], Bool[Tensor, "images chosen"]]:
    """The indices of at most `count` valid RoIs of greatest loss, positive ones first, and which rows are filled.

    With an `nms_iou` below 1, a RoI that overlaps a harder RoI of its image by more is left out. NaN counts as the
    greatest loss, so that it shows.
    """
    losses = losses.nan_to_num(nan=torch.inf, posinf=torch.inf)
    may_be_chosen = rois.is_valid
    if nms_iou < 1:
        image = torch.arange(len(losses), device=losses.device).unsqueeze(1)
        segments = torch.where(may_be_chosen, image, -1)
        kept = segmented_nms(rois.boxes.flatten(0, 1), losses.flatten(), segments.flatten(), nms_iou)
        may_be_chosen = kept.view_as(may_be_chosen)
    keys, index = top(score_keys(losses).masked_fill(~may_be_chosen, NEVER), count)
    is_valid = keys != NEVER
    positives_first = (rois.is_positive.gather(1, index) & is_valid).logical_not().to(torch.uint8)
    order = positives_first.argsort(dim=1, stable=True)
    return index.gather(1, order), is_valid.gather(1, order)
