import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megdet.ops.losses import masked_cross_entropy_logits, mean_per_image, smooth_l1


def test_each_image_is_divided_by_its_own_number_of_samples():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    is_valid = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert mean_per_image(values, is_valid).tolist() == [2.0, 4.0, 0.0]


def test_cross_entropy_of_logits_is_that_of_hand_arithmetic():
    logits = torch.tensor([[0.0, 2.0, -3.0, 5.0]])
    is_positive, is_valid = torch.tensor([[True, False, True, True]]), torch.tensor([[True, True, True, False]])
    expected = [math.log(2), math.log1p(math.exp(2)), math.log1p(math.exp(3)), 0.0]
    torch.testing.assert_close(masked_cross_entropy_logits(logits, is_positive, is_valid), torch.tensor([expected]))


def test_samples_that_stand_for_nothing_get_no_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    is_valid = torch.tensor([[True, False, True], [False, False, False]])
    masked_cross_entropy_logits(logits, torch.ones(2, 3, dtype=torch.bool), is_valid).sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad != 0, is_valid)


@given(st.floats(-10, 10), st.floats(0, 2))
def test_smooth_l1_is_square_below_beta_and_linear_above(difference, beta):
    expected = abs(difference) - beta / 2 if abs(difference) >= beta else difference**2 / (2 * beta)
    loss = smooth_l1(torch.tensor([difference]).double(), torch.zeros(1).double(), beta)
    assert float(loss) == pytest.approx(expected, rel=1e-6, abs=1e-9)  # the tensor is made from a float32
