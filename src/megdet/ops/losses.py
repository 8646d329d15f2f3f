"""Loss terms as sums of one image's samples over that image's own number of samples (Eq. 1)."""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def mean_per_image(
    values: Float[Tensor, "images samples"], is_valid: Bool[Tensor, "images samples"]
) -> Float[Tensor, " images"]:
    """Sum of each image's values over max(1, the number of its valid samples); values of invalid samples must be 0."""
    return values.sum(1) / is_valid.sum(1).clamp(min=1)


def masked_cross_entropy_logits(
    logits: Float[Tensor, "images samples"],
    is_positive: Bool[Tensor, "images samples"],
    is_valid: Bool[Tensor, "images samples"],
) -> Float[Tensor, "images samples"]:
    """Binary cross-entropy of logits, 0 for samples that are not valid."""
    loss = F.binary_cross_entropy_with_logits(logits, is_positive.to(logits.dtype), reduction="none")
    return loss * is_valid


def smooth_l1(values: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"], beta: float) -> Float[Tensor, "*shape"]:
    """|d| - beta / 2 where |d| > beta, d^2 / (2 beta) below (Fast R-CNN); beta 0 is |d|."""
    return F.smooth_l1_loss(values, wanted, reduction="none", beta=beta)
