import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from factories import relative
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.convert import norm_factory
from megdet.model.fpn import Fpn

WIDTHS = [4, 6, 8, 10]


def features(height: int, width: int, images: int = 2) -> list[torch.Tensor]:
    """C2 to C5 with odd sizes where the canvas has them."""
    return [
        torch.randn(images, c, -(-height // s), -(-width // s)) for c, s in zip(WIDTHS, (4, 8, 16, 32), strict=True)
    ]


def test_the_pyramid_equals_torchvisions():
    torch.manual_seed(0)
    ours, theirs = (
        Fpn(WIDTHS, 5, norm_factory("none"), has_norm=False),
        FeaturePyramidNetwork(WIDTHS, 5, LastLevelMaxPool()),
    )
    for tensor in ours.parameters():
        nn.init.normal_(tensor, 0, 0.3)
    names = {"lateral": "inner_blocks", "output": "layer_blocks"}
    theirs.load_state_dict(
        {f"{names[k.split('.')[0]]}.{k.split('.', 1)[1]}": tensor for k, tensor in ours.state_dict().items()}
    )
    for canvas in ((64, 96), (72, 104)):
        inputs = features(*canvas)
        expected = list(theirs({str(i): level for i, level in enumerate(inputs)}).values())
        pyramid = ours(inputs)
        assert len(pyramid) == 5
        for a, b in zip(expected, pyramid, strict=True):
            assert relative(a, b) < 1e-5


@pytest.mark.parametrize("p6_from", ["c5", "p5"])
def test_the_pyramid_of_a_detector_of_one_stage_equals_torchvisions(p6_from):
    torch.manual_seed(0)
    channels = 5
    ours = Fpn(WIDTHS[1:], channels, norm_factory("none"), has_norm=False, p6_from=p6_from)
    # torchvision takes P5 where the width that it is told is that of the pyramid
    extra = LastLevelP6P7(WIDTHS[-1] if p6_from == "c5" else channels, channels)
    theirs = FeaturePyramidNetwork(WIDTHS[1:], channels, extra)
    for tensor in ours.parameters():
        nn.init.normal_(tensor, 0, 0.3)
    names = {"lateral": "inner_blocks", "output": "layer_blocks", "p6": "extra_blocks.p6", "p7": "extra_blocks.p7"}
    theirs.load_state_dict(
        {f"{names[k.split('.')[0]]}.{k.split('.', 1)[1]}": tensor for k, tensor in ours.state_dict().items()}
    )
    for canvas in ((64, 96), (72, 104)):
        inputs = features(*canvas)
        expected = list(theirs({str(i): level for i, level in enumerate(inputs[1:])}).values())
        pyramid = ours(inputs)  # C2 too, which does not enter
        assert len(pyramid) == 5
        for a, b in zip(expected, pyramid, strict=True):
            assert relative(a, b) < 1e-5


@pytest.mark.parametrize("p6_from", ["c5", "p5"])
@pytest.mark.parametrize("canvas", [(32, 32), (96, 32), (64, 64)])
def test_coarse_levels_a_pixel_wide_have_finite_gradients_in_bfloat16(p6_from, canvas):
    fpn = Fpn(WIDTHS[1:], 16, norm_factory("none"), has_norm=False, p6_from=p6_from)
    fpn = fpn.to(memory_format=torch.channels_last)
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(level.float().sum() for level in fpn(features(*canvas)))
        # What torch gives out next was written by these
        spoilt = [torch.full((size,), float("nan")) for size in (500, 2_000, 5_000, 20_000, 100_000) for _ in range(3)]
        del spoilt
        fpn.zero_grad()
        loss.backward()
        assert all(weights.grad.isfinite().all() for weights in fpn.parameters())


def test_every_convolution_gets_its_own_norm_and_then_no_bias():
    fpn = Fpn(WIDTHS, 8, norm_factory("batch"), has_norm=True)
    assert sum(isinstance(module, CrossDeviceBatchNorm) for module in fpn.modules()) == 8
    assert all(module.bias is None for module in fpn.modules() if isinstance(module, nn.Conv2d))


def test_no_images_make_an_empty_pyramid():
    fpn = Fpn(WIDTHS, 8, norm_factory("none"), has_norm=False)
    assert [tuple(level.shape) for level in fpn(features(64, 64, images=0))] == [
        (0, 8, 16, 16),
        (0, 8, 8, 8),
        (0, 8, 4, 4),
        (0, 8, 2, 2),
        (0, 8, 1, 1),
    ]
