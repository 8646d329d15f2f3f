import math

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from factories import random_boxes
from megdet.ops.boxes import encode_boxes
from megdet.ops.losses import box_loss, giou_loss, masked_cross_entropy_logits, mean_per_image, smooth_l1


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


def test_giou_is_that_of_hand_arithmetic():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).expand(4, 4)
    wanted = torch.tensor([[0.0, 0.0, 4.0, 4.0], [2.0, 2.0, 6.0, 6.0], [6.0, 0.0, 10.0, 4.0], [1.0, 1.0, 2.0, 3.0]])
    expected = [0.0, 1 - 4 / 28 + (36 - 28) / 36, 1 + 8 / 40, 1 - 2 / 16]
    torch.testing.assert_close(giou_loss(boxes, wanted), torch.tensor(expected))


def test_giou_and_its_gradient_equal_torchvisions():
    torch.manual_seed(0)
    wanted, start = random_boxes(200).double(), random_boxes(200).double()
    found = []
    for loss in (giou_loss, torchvision.ops.generalized_box_iou_loss):
        boxes = start.clone().requires_grad_()
        values = loss(boxes, wanted)
        values.sum().backward()
        found.append((values.detach(), boxes.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert (found[0][0] > 1).any()
    assert (found[0][0] < 1).any()


def test_giou_has_the_gradient_of_its_values():
    torch.manual_seed(0)
    boxes, wanted = random_boxes(20).double().requires_grad_(), random_boxes(20).double()
    assert torch.autograd.gradcheck(lambda own: giou_loss(own, wanted), boxes)


def test_boxes_of_no_area_have_a_finite_giou_and_gradient():
    boxes = torch.zeros(2, 4, requires_grad=True)
    loss = giou_loss(boxes, torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 2.0, 2.0]]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_regressed_boxes_cost_by_their_deltas_or_by_what_they_decode_to(weights):
    torch.manual_seed(0)
    references, boxes, wanted_boxes = (random_boxes(12).double().reshape(2, 6, 4) for _ in range(3))
    deltas, wanted = (encode_boxes(own, references, weights) for own in (boxes, wanted_boxes))
    giou = box_loss("giou", deltas, wanted, references, weights, 1 / 9)
    torch.testing.assert_close(giou, giou_loss(boxes, wanted_boxes))
    plain = box_loss("smooth_l1", deltas, wanted, references, weights, 1 / 9)
    torch.testing.assert_close(plain, smooth_l1(deltas, wanted, 1 / 9).sum(2))
