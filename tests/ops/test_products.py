import pytest
import torch

from factories import needs_onednn, relative
from megdet.ops import products
from megdet.ops.products import by_onednn, gradient_of_weights, product


@needs_onednn
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (7, 5, 3), (36, 36, 500), (3, 200, 40)])
def test_products_of_onednn_are_torchs_from_any_order_of_memory(rows, inner, columns):
    torch.manual_seed(rows)
    x, y, bias = torch.randn(rows, inner), torch.randn(columns, inner), torch.randn(columns)
    for own in (x, x.t().contiguous().t()):
        for other in (y, y.t().contiguous().t()):
            assert relative(x @ y.t() + bias, by_onednn(own, other, bias)) < 1e-5


@needs_onednn
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 9), (9, 5)])
def test_the_gradient_of_weights_lies_as_they_do(outputs, inputs):
    torch.manual_seed(0)
    upstream, x = torch.randn(40, outputs), torch.randn(40, inputs)
    found = gradient_of_weights(upstream, x)
    assert relative(upstream.t() @ x, found) < 1e-5
    assert found.is_contiguous()


@pytest.mark.parametrize("is_faster", [pytest.param(True, marks=needs_onednn), False])
def test_many_products_are_made_and_added_by_either_library(monkeypatch, is_faster):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: is_faster)
    torch.manual_seed(0)
    x, y, onto = torch.randn(4, 6, 5), torch.randn(4, 5, 3), torch.randn(4, 6, 3)
    expected = x @ y
    assert relative(expected, products.products(x, y)) < 1e-5
    assert relative(expected[0], product(x[0], y[0])) < 1e-5
    before = onto.clone()
    assert products.products(x, y, onto=onto) is onto
    assert relative(before + expected, onto) < 1e-5
