"""What the first stage of a detector hands to the second."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass
class Proposals:
    """The best boxes of the first stage, best first, padded to a fixed number an image; in pixels of the canvas.

    `identities` names the anchor that a proposal came from; it is what its sampling is drawn by.
    """

    boxes: Float[Tensor, "images proposals 4"]
    identities: Int64[Tensor, "images proposals"]
    is_valid: Bool[Tensor, "images proposals"]

    def shortened(self, least: int) -> "Proposals":
        """Without the columns after `least` that are padding in every image; a GPU keeps all of them."""
        width = filled_columns(self.is_valid, least)
        return Proposals(self.boxes[:, :width], self.identities[:, :width], self.is_valid[:, :width])


def filled_columns(is_valid: Bool[Tensor, "images columns"], least: int) -> int:
    """How many columns hold something in any image, which come first, but not less than `least` of them.

    A CPU computes every row, so fewer are better. A GPU would have to wait for the number, and no shape of an
    exported graph depends on what is found: there it is all of them.
    """
    if torch.compiler.is_exporting() or is_valid.is_cuda or not len(is_valid):
        return is_valid.shape[1]
    return min(is_valid.shape[1], max(least, int(is_valid.sum(1).max())))
