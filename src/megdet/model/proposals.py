"""What the first stage of a detector hands to the second."""

from dataclasses import dataclass

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
        """Without the columns after `least` that are padding in every image; waits for the device to count them."""
        if len(self.is_valid) == 0:
            return self
        width = max(least, int(self.is_valid.sum(1).max()))
        return Proposals(self.boxes[:, :width], self.identities[:, :width], self.is_valid[:, :width])
