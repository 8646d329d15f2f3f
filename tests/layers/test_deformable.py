from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torchvision.ops import deform_conv2d

from factories import relative
from megdet.layers import recomputed_outputs
from megdet.layers.deformable import DeformableConv2d
from megdet.layers.recomputed_outputs import recompute_outputs

SHAPES = {
    "plain": {"padding": 1},
    "strided": {"padding": 1, "stride": 2},
    "dilated": {"padding": 2, "dilation": 2},
    "grouped": {"padding": 1, "groups": 2},
    "depthwise": {"padding": 1, "groups": 4, "bias": True},
    "uneven": {"padding": (2, 0), "dilation": (2, 1), "stride": (1, 2), "bias": True},
}


def make(modulated: bool = False, dtype: torch.dtype = torch.float64, **shape: object) -> DeformableConv2d:
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 4, 3, **({"padding": 1, "bias": False} | shape)).to(dtype)
    return DeformableConv2d(plain, modulated=modulated).to(dtype)


def moved(layer: DeformableConv2d) -> DeformableConv2d:
    """Offsets of several pixels, none of them near a whole number for the inputs of the tests."""
    torch.manual_seed(1)
    nn.init.normal_(layer.offsets.weight, std=0.4)
    nn.init.normal_(layer.offsets.bias, std=0.6)
    return layer


def pixels(count: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(count, 4, 7, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)


def by_torchvision(layer: DeformableConv2d, x: torch.Tensor) -> torch.Tensor:
    found = layer.offsets(x)
    mask = 2 * found[:, 18:].sigmoid() if found.shape[1] > 18 else None
    options = layer.bias, layer.stride, layer.padding, layer.dilation, mask
    return deform_conv2d(x, found[:, :18], layer.weight, *options)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_starts_as_the_plain_convolution_and_draws_no_random_number(shape, modulated):
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 4, 3, **({"bias": False} | shape)).double()
    state = torch.get_rng_state()
    layer = DeformableConv2d(plain, modulated=modulated).double()
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.weight is plain.weight
    assert relative(plain(pixels()), layer(pixels())) < 1e-14
    assert relative(plain.float()(pixels().float()), layer.float()(pixels().float())) < 1e-6


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_torchvisions_operator_forward_and_backward(shape, modulated):
    layer = moved(make(modulated, **shape))
    found = []
    for forward in (layer, lambda x: by_torchvision(layer, x)):
        x = pixels().requires_grad_()
        y = forward(x)
        torch.manual_seed(3)
        gradients = torch.autograd.grad(y, [x, *layer.parameters()], torch.randn(y.shape, dtype=y.dtype))
        found.append([y, *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert relative(theirs, ours) < 1e-12


@pytest.mark.parametrize("modulated", [False, True])
def test_its_gradients_are_those_of_differences(modulated):
    layer = moved(make(modulated, padding=2, dilation=2, groups=2))
    names, weights = zip(*layer.named_parameters(), strict=True)

    def forward(x: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, own, strict=True)), x)

    assert torch.autograd.gradcheck(forward, (pixels(1)[:, :, :4, :4].requires_grad_(), *weights), fast_mode=True)


def test_whole_offsets_move_the_kernel_by_hand():
    layer = make()
    with torch.no_grad():
        layer.offsets.bias.copy_(torch.tensor([1.0, -2.0] * 9))  # one row down, two columns to the left
    x = pixels()
    shifted = torch.zeros_like(x)
    shifted[:, :, :-1, 2:] = x[:, :, 1:, :-2]
    plain = nn.functional.conv2d(shifted, layer.weight, padding=1)
    inner = layer(x)[:, :, 1:-1, 3:-1]  # at the border the kernel would see pixels that the shift has lost
    assert relative(plain[:, :, 1:-1, 3:-1], inner) < 1e-14


def test_half_a_pixel_reads_the_mean_of_two_by_hand():
    layer = make()
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0, 1, 1] = 1.0
        layer.offsets.bias[9] = 0.5  # the centre of the kernel moves in x
    x = pixels()
    right = torch.cat([x[:, 0, :, 1:], torch.zeros(2, 7, 1)], 2)
    torch.testing.assert_close(layer(x)[:, 0], (x[:, 0] + right) / 2)


def test_a_modulation_of_no_weight_silences_its_point():
    layer = make(modulated=True)
    with torch.no_grad():
        layer.offsets.bias[18:].fill_(-200.0)
        layer.offsets.bias[18 + 4] = 200.0  # the centre of the kernel, which weighs twice
    centre = nn.functional.conv2d(pixels(), layer.weight[:, :, 1:2, 1:2])
    assert relative(2 * centre, layer(pixels())) < 1e-14


def test_a_share_without_images_has_gradients_of_zero():
    layer = moved(make(modulated=True))
    x = pixels(0).requires_grad_()
    y = layer(x)
    assert y.shape == (0, 4, 7, 6)
    y.sum().backward()
    assert all(parameter.grad.eq(0).all() for parameter in layer.parameters())


def test_an_image_does_not_depend_on_its_neighbours():
    layer = moved(make(modulated=True))
    assert relative(layer(pixels())[1:], layer(pixels()[1:])) < 1e-14


def test_offsets_of_nan_give_nan_and_no_crash():
    layer = moved(make())
    with torch.no_grad():
        layer.offsets.bias[0] = float("nan")
    assert layer(pixels()).isnan().all()


def test_bfloat16_is_float32_within_its_precision_and_memory_stays_channels_last():
    layer = make(dtype=torch.float32)
    with torch.no_grad():
        layer.offsets.bias.fill_(0.25)
    x = pixels(dtype=torch.float32)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative(plain, y.float()) < 0.02
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("modulated", [False, True])
def test_the_samples_are_not_kept_but_taken_again_to_the_bit(modulated, monkeypatch):
    layer = moved(make(modulated, torch.float32))
    original, kept = recomputed_outputs._pack, []

    def pack(tensor: torch.Tensor) -> object:
        packed = original(tensor)
        kept.extend([packed] if isinstance(packed, torch.Tensor) else [])
        return packed

    monkeypatch.setattr(recomputed_outputs, "_pack", pack)
    found = []
    for context in (nullcontext, recompute_outputs):
        x = pixels(dtype=torch.float32).requires_grad_()
        with context():
            y = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept
    assert not any(tensor.shape == (2, 4, 21, 18) for tensor in kept)
