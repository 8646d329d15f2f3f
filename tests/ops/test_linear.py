import pytest
import torch
from torch.nn import functional as F

from factories import relative
from megdet.ops.linear import linear


@pytest.mark.parametrize("rows", [0, 1, 7, 130])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_is_torchs_layer_in_output_and_gradients(rows, has_bias):
    torch.manual_seed(rows)
    found = []
    given = [torch.randn(rows, 37), torch.randn(19, 37), torch.randn(19)]
    upstream = torch.randn(rows, 19)
    for function in (linear, F.linear):
        x, weight, bias = (tensor.clone().requires_grad_() for tensor in given)
        y = function(x, weight, bias if has_bias else None)
        y.backward(upstream)
        found.append([y, x.grad, weight.grad] + ([bias.grad] if has_bias else []))
    for ours, theirs in zip(*found, strict=True):
        assert relative(theirs, ours) < 1e-5


def test_frozen_inputs_and_weights_get_no_gradient():
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    linear(x, weight, None).sum().backward()
    assert relative(x.sum(0).expand(5, 4), weight.grad) < 1e-6
    x.requires_grad_()
    linear(x, weight.detach(), None).sum().backward()
    assert x.grad is not None


def test_other_number_formats_are_torchs_own():
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x.float(), weight.float(), None).dtype == torch.bfloat16
