"""What one image costs the paper's detector: multiply-adds, values to normalise, gradients (ResNet-50 FPN, Sec. 4).

Counted from the layers' shapes. Convolutions and matrix products count, with two FLOPs a multiply-add and a backward of
twice the forward (gradients of inputs and of weights); RoIAlign, NMS and losses do not.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from megdet.recipe import Anchors, BoxHead, Fpn

_WIDTHS, _BLOCKS = (64, 128, 256, 512), (3, 4, 6, 3)
"""He et al. 2016, Table 1: the 3 x 3 convolutions of the four stages, and the blocks of each."""
_EXPANSION = 4
_NUM_CLASSES = 80
STAGES = 5
"""The stem and four stages, as `backbone.frozen_stages` counts them."""


class Convolution(NamedTuple):
    """A convolution of the backbone, followed by a norm layer."""

    stage: int
    """1 = the stem, 2 to 5"""
    inputs: int
    channels: int
    kernel: int
    stride: int
    """pixels of the image to one of its output, along an edge"""

    @property
    def weights(self) -> int:
        """Numbers of its kernel."""
        return self.inputs * self.channels * self.kernel**2


@cache
def resnet50() -> tuple[Convolution, ...]:
    """The 53 convolutions of ResNet-50, the stride of a stage in its first 3 x 3 convolution as in torchvision."""
    layers = [Convolution(1, 3, 64, 7, 2)]
    inputs, stride = 64, 4
    for stage, (width, blocks) in enumerate(zip(_WIDTHS, _BLOCKS, strict=True), start=2):
        for block in range(blocks):
            before = stride
            if block == 0 and stage > 2:
                stride *= 2
            layers.append(Convolution(stage, inputs, width, 1, before))
            layers.append(Convolution(stage, width, width, 3, stride))
            layers.append(Convolution(stage, width, width * _EXPANSION, 1, stride))
            if block == 0:
                layers.append(Convolution(stage, inputs, width * _EXPANSION, 1, stride))
            inputs = width * _EXPANSION
    return tuple(layers)


@dataclass(frozen=True)
class Work:
    """What an image of so many pixels asks of a device."""

    forward: float
    """FLOPs"""
    backward: float
    """FLOPs"""
    backbone: float
    """FLOPs of the backbone's forward, a part of `forward`"""
    normed: float
    """values that pass through norm layers in the forward"""
    normed_backward: float
    """values whose gradient passes back through them"""


@cache
def image_work(pixels: float, frozen_stages: int = 0, sparse_rpn: bool = False) -> Work:
    """The work of one image on a canvas of so many pixels.

    A frozen stage has no backward. `sparse_rpn`: the RPN's head and loss go back through sampled anchors alone
    (`rpn.sparse_loss`), whose gradient is small enough to count as nothing.
    """
    stages = [0.0] * (STAGES + 1)
    values = [0.0] * (STAGES + 1)
    for layer in resnet50():
        places = pixels / layer.stride**2
        stages[layer.stage] += layer.weights * places
        values[layer.stage] += layer.channels * places
    backbone, trained = sum(stages), sum(stages[frozen_stages + 1 :], 0.0)
    head = _fpn(pixels) + _box_head()
    rpn = _rpn(pixels)
    return Work(
        forward=2 * (backbone + head + rpn),
        backward=4 * (trained + head + (0.0 if sparse_rpn else rpn)),
        backbone=2 * backbone,
        normed=sum(values),
        normed_backward=sum(values[frozen_stages + 1 :], 0.0),
    )


@cache
def kept_values(pixels: float, frozen_stages: int = 0) -> float:
    """Values that the forward of one image keeps for the backward.

    An assumption, counted: two for each value that passes through a norm layer (what the norm layer and what the next
    convolution read), and three on each place and channel of the pyramid (the inputs of its 3 x 3 convolutions, of the
    RPN's, and of the RPN's outputs). Of a frozen stage only what leaves it is kept, for the pyramid. Targets, RoIs and
    the box head are small beside them.
    """
    pyramid = sum(Fpn().channels * pixels / stride**2 for stride in (4, 8, 16, 32, 64))
    outputs = [width * _EXPANSION * pixels / stride**2 for width, stride in zip(_WIDTHS, (4, 8, 16, 32), strict=True)]
    left = sum(outputs[: max(0, frozen_stages - 1)])
    return 2 * image_work(pixels, frozen_stages).normed_backward + left + 3 * pyramid


def num_gradients(frozen_stages: int = 0) -> int:
    """Trained numbers of the detector."""
    trained = [layer for layer in resnet50() if layer.stage > frozen_stages]
    backbone = sum(layer.weights + 2 * layer.channels for layer in trained)
    channels, hidden, outputs = Fpn().channels, BoxHead().channels, _NUM_CLASSES + 1 + 4 * _NUM_CLASSES
    laterals = sum(width * _EXPANSION * channels + channels for width in _WIDTHS)
    pyramid = laterals + len(_WIDTHS) * (9 * channels**2 + channels)
    rpn = 9 * channels**2 + channels + (channels + 1) * 5 * len(Anchors().ratios)
    pooled = channels * BoxHead().pool_size ** 2
    return backbone + pyramid + rpn + (pooled + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * outputs


def _fpn(pixels: float) -> float:
    channels = Fpn().channels
    return sum(
        (width * _EXPANSION * channels + 9 * channels**2) * pixels / stride**2
        for width, stride in zip(_WIDTHS, (4, 8, 16, 32), strict=True)
    )


def _rpn(pixels: float) -> float:
    channels = Fpn().channels
    weights = 9 * channels**2 + channels * 5 * len(Anchors().ratios)
    return sum(weights * pixels / stride**2 for stride in (4, 8, 16, 32, 64))


def _box_head() -> int:
    head = BoxHead()
    outputs = _NUM_CLASSES + 1 + 4 * _NUM_CLASSES
    return head.samples * head.channels * (Fpn().channels * head.pool_size**2 + head.channels + outputs)
