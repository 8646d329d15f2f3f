"""The sampling points of a deformable convolution (Dai et al., 2017)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Pair = tuple[int, int]


def moved_taps(
    offsets: Float[Tensor, "images points_y_and_x rows columns"],
    size: Pair,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Int64[Tensor, "samples 4"], Float[Tensor, "samples 4"]]:
    """The four pixels around each moved point of the kernel, for each output position, and their bilinear weights.

    Pixels of maps of height and width `size` are indexed over all images, row by row. The samples form images of
    rows * kernel[0] by columns * kernel[1]. `offsets` are as in `torchvision.ops.deform_conv2d`: for every point of the
    kernel, row by row, its shift in y and in x, in pixels of the input. Pixels outside the map have the weight 0; a NaN
    offset gives NaN weights.
    """
    images, _, rows, columns = offsets.shape
    work = torch.float64 if offsets.dtype == torch.float64 else torch.float32
    moves = offsets.to(work).reshape(images, *kernel, 2, rows, columns).permute(3, 0, 4, 1, 5, 2)
    y = _places(rows, kernel[0], stride[0], padding[0], dilation[0], moves).unsqueeze(2).unsqueeze(3)
    x = _places(columns, kernel[1], stride[1], padding[1], dilation[1], moves)
    y_index, y_weights = _around(moves[0] + y, size[0])
    x_index, x_weights = _around(moves[1] + x, size[1])
    image = torch.arange(images, device=offsets.device).reshape(-1, *[1] * 5)
    index = ((image * size[0] + y_index) * size[1]).unsqueeze(6) + x_index.unsqueeze(5)
    weights = y_weights.unsqueeze(6) * x_weights.unsqueeze(5)
    return index.reshape(-1, 4), weights.reshape(-1, 4)


def _places(count: int, points: int, stride: int, padding: int, dilation: int, like: Tensor) -> Tensor:
    """The coordinates of the kernel's points along one axis at each output position, (positions, points)."""
    place = torch.arange(count, device=like.device, dtype=like.dtype) * stride - padding
    return place.unsqueeze(1) + torch.arange(points, device=like.device, dtype=like.dtype) * dilation


def _around(points: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The lower and upper pixel along one axis and their weights, in the last dimension."""
    low = points.detach().nan_to_num(nan=0.0).clamp(-2, length).floor()
    fraction = points - low
    index = torch.stack([low, low + 1], -1).to(torch.int64)
    weights = torch.stack([1 - fraction, fraction], -1)
    is_outside = (index < 0) | (index >= length)
    return index.clamp(0, length - 1), weights.masked_fill(is_outside, 0)
