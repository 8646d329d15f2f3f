"""Deformable convolution (Dai et al., 2017): the sampling points of the kernel move by offsets that are learned.

The bilinear samples at the moved points are laid out as a larger image, channels last, so that a plain convolution with
a stride of the kernel size does the rest, with its groups, dtypes and memory formats. Unlike
`torchvision.ops.deform_conv2d` the backward has no scatter with atomics: it is deterministic on every device.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.layers.recomputed_outputs import mark_recomputable
from megdet.ops.moved_samples import Pair, moved_taps
from megdet.ops.weighted_bag import weighted_bags


class DeformableConv2d(nn.Conv2d):
    """A deformable convolution with the weights of a plain one; it gives the same result until its offsets are trained.

    The offsets come from a second convolution of the same shape and begin at 0. Positions are computed in float32
    (float64 for float64 input) whatever the precision of the input.

    Args:
        plain: the convolution, with zeros around its input.
        modulated: also weight every sample, between 0 and 2 (Zhu et al., 2019). Differs from the paper, whose weights
            lie between 0 and 1 and start at 0.5: here they start at 1.
    """

    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    def __init__(self, plain: nn.Conv2d, *, modulated: bool) -> None:
        shape: dict[str, Any] = {
            name: getattr(plain, name) for name in ("kernel_size", "stride", "padding", "dilation")
        }
        # on the meta device, so that no random numbers are drawn
        super().__init__(plain.in_channels, plain.out_channels, **shape, groups=plain.groups, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        points = self.kernel_size[0] * self.kernel_size[1]
        self.num_offsets = 2 * points
        offsets = self.num_offsets + (points if modulated else 0)
        device = plain.weight.device
        self.offsets = nn.Conv2d(plain.in_channels, offsets, **shape, device="meta").to_empty(device=device)
        for parameter in self.offsets.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images filters _ _"]:
        """Convolve the samples at the moved points."""
        found = self.offsets(x)
        offsets, modulation = found[:, : self.num_offsets], found[:, self.num_offsets :]
        size, kernel = (x.shape[2], x.shape[3]), self.kernel_size
        index, weights = moved_taps(offsets, size, kernel, self.stride, self.padding, self.dilation)
        if modulation.shape[1]:
            by_sample = modulation.to(weights.dtype).unflatten(1, kernel).permute(0, 3, 1, 4, 2)
            weights = weights * (2 * by_sample.sigmoid()).reshape(-1, 1)
        grid = x.shape[0], found.shape[2] * kernel[0], found.shape[3] * kernel[1], x.shape[1]
        rows = x.permute(0, 2, 3, 1).reshape(x.shape[0] * size[0] * size[1], x.shape[1])

        def sampled(rows: Tensor, weights: Tensor) -> Tensor:
            return weighted_bags(rows, index, weights).reshape(grid).permute(0, 3, 1, 2)

        samples = sampled(rows, weights)
        kept = rows.detach(), weights.detach()
        # not kept for the backward: the samples are nine times the input, and can be computed again
        mark_recomputable(samples, lambda: sampled(*kept))
        return F.conv2d(samples, self.weight, self.bias, stride=kernel, groups=self.groups)
