import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from megdet.ops import products, winograd
from megdet.ops.winograd import convolve_3x3, num_tiles


def error(found, exact):
    """The root of the mean squared error, in units of the exact numbers' own."""
    return ((found - exact).square().mean() / exact.square().mean()).sqrt().item()


def with_gradients(function, maps, weight, bias, upstreams):
    """The outputs of a convolution and the gradients of all that went in."""
    entered = [tensor.detach().clone().requires_grad_() for tensor in (weight, bias, *maps)]
    outputs = function(entered[2:], entered[0], entered[1])
    gradients = torch.autograd.grad(outputs, entered, [own.to(outputs[0].dtype) for own in upstreams])
    return [*(own.detach() for own in outputs), *gradients]


def reference(maps, weight, bias):
    return [F.conv2d(own, weight, bias, padding=1) for own in maps]


def made(shapes, inputs, outputs, seed=0):
    """Maps, weights, biases and upstream gradients."""
    torch.manual_seed(seed)
    maps = [torch.randn(images, inputs, height, width) for images, height, width in shapes]
    upstreams = [torch.randn(images, outputs, height, width) for images, height, width in shapes]
    return maps, torch.randn(outputs, inputs, 3, 3), torch.randn(outputs), upstreams


def in_doubles(maps, weight, bias, upstreams):
    return with_gradients(reference, [own.double() for own in maps], weight.double(), bias.double(), upstreams)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 14))


libraries = st.sampled_from([True, False] if products.HAS_ONEDNN else [False])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(shapes, min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([1, 30, 200]),
    libraries,
)
def test_outputs_and_gradients_are_those_of_the_convolution(own_shapes, inputs, outputs, chunk, by_onednn):
    maps, weight, bias, upstreams = made(own_shapes, inputs, outputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "onednn_is_faster", lambda: by_onednn)
        patch.setattr(winograd, "_CHUNK", chunk)  # so that a map is cut between its rows, between images or not at all
        winograd._chunks.cache_clear()
        found = with_gradients(convolve_3x3, maps, weight, bias, upstreams)
    winograd._chunks.cache_clear()
    for ours, exact in zip(found, in_doubles(maps, weight, bias, upstreams), strict=True):
        assert ours.shape == exact.shape
        assert error(ours, exact) < 5e-6


def test_its_rounding_error_is_a_few_times_that_of_plain_sums():
    maps, weight, bias, upstreams = made([(1, 24, 24)], 256, 128)
    maps = [F.relu(own) for own in maps]
    exact = in_doubles(maps, weight, bias, upstreams)
    ours = with_gradients(convolve_3x3, maps, weight, bias, upstreams)
    # the reference sums the products of one input channel after another
    patches = F.unfold(maps[0], 3, padding=1)[0].reshape(256, 9, -1)
    plain = torch.zeros(128, patches.shape[2])
    for channel in range(256):
        plain += weight[:, channel].flatten(1) @ patches[channel]
    plain += bias.unsqueeze(1)
    assert error(ours[0], exact[0]) < 5 * error(plain.view_as(ours[0]), exact[0])
    assert all(error(own, true) < 5e-6 for own, true in zip(ours, exact, strict=True))


def test_memory_may_lie_in_any_order():
    maps, weight, bias, _ = made([(2, 9, 6)], 4, 5)
    ordered = maps[0].to(memory_format=torch.channels_last)
    turned = weight.to(memory_format=torch.channels_last)
    (first,) = convolve_3x3(maps, weight, bias)
    (second,) = convolve_3x3([ordered], turned, bias)
    assert torch.equal(first, second)
    assert second.is_contiguous(memory_format=torch.channels_last)
    entered = ordered.clone().requires_grad_()
    convolve_3x3([entered], turned, bias)[0].sum().backward()  # an upstream gradient that is one number
    doubled = maps[0].double().requires_grad_()
    F.conv2d(doubled, weight.double(), padding=1).sum().backward()
    assert error(entered.grad, doubled.grad) < 5e-6


def test_no_images_have_no_outputs_and_no_gradient():
    maps, weight, bias, upstreams = made([(0, 14, 14)], 4, 5)
    output, of_weight, of_bias, of_map = with_gradients(convolve_3x3, maps, weight, bias, upstreams)
    assert output.shape == (0, 5, 14, 14)
    assert of_map.shape == (0, 4, 14, 14)
    assert of_weight.count_nonzero() == of_bias.count_nonzero() == 0


def test_only_what_is_trained_has_a_gradient():
    maps, weight, bias, _ = made([(1, 8, 8)], 2, 3)
    weight.requires_grad_()
    convolve_3x3(maps, weight, None)[0].sum().backward()
    assert weight.grad is not None
    assert maps[0].grad is None
    entered = maps[0].requires_grad_()
    convolve_3x3([entered], weight.detach(), bias)[0].sum().backward()
    assert entered.grad is not None
    assert bias.grad is None


def test_tiles_cover_a_map():
    assert [num_tiles(*edges) for edges in ((4, 4), (5, 4), (1, 1), (40, 20))] == [1, 2, 1, 50]
