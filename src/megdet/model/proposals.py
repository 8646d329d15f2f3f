"""The proposals that the first stage of a detector passes to the second."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass
class Proposals:
    """The best boxes of the first stage, best first, padded to a fixed number an image; in pixels of the canvas.

    `identities` is the anchor that a proposal came from; the random number for sampling it is a hash of this.
    """

    boxes: Float[Tensor, "images proposals 4"]
    identities: Int64[Tensor, "images proposals"]
    is_valid: Bool[Tensor, "images proposals"]

    def shortened(self, least: int) -> "Proposals":
        """The proposals without the columns after `least` that are padding in every image; on a GPU all are kept."""
        width = filled_columns(self.is_valid, least)
        return Proposals(self.boxes[:, :width], self.identities[:, :width], self.is_valid[:, :width])


def filled_columns(is_valid: Bool[Tensor, "images columns"], least: int) -> int:
    """The number of leading columns that are filled in some image, at least `least`.

    On a CPU fewer rows mean less work. On a GPU, which would have to wait for the number, and in an exported graph,
    whose shapes are fixed, it is the number of all columns.
    """
    if torch.compiler.is_exporting() or is_valid.is_cuda or not len(is_valid):
        return is_valid.shape[1]
    return min(is_valid.shape[1], max(least, int(is_valid.sum(1).max())))
