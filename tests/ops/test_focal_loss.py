"""The focal loss of all pairs against torchvision's, which needs a target for each."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from factories import relative
from megdet.ops import focal_loss as module
from megdet.ops.focal_loss import focal_loss


def pairs(images: int = 3, anchors: int = 50, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of -20 to 20, labels of which half are -1, and which anchors are counted."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.rand(images, anchors, classes, generator=generator, dtype=torch.float64) - 0.5) * 40
    labels = torch.randint(-classes, classes, (images, anchors), generator=generator).clamp(min=-1)
    return logits, labels, torch.rand(images, anchors, generator=generator) > 0.3


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 0.0), (0.5, 1.0), (1.0, 1.5), (0.0, 5.0)])
@pytest.mark.parametrize("at_once", [1 << 14, 16])
def test_sums_and_gradients_are_torchvisions(alpha, gamma, at_once, monkeypatch):
    monkeypatch.setattr(module, "_ANCHORS_AT_ONCE", at_once)
    logits, labels, is_counted = pairs()
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    target = F.one_hot(labels + 1, 8)[..., 1:].double()
    expected = (sigmoid_focal_loss(theirs, target, alpha, gamma) * is_counted.unsqueeze(2)).sum((1, 2))
    found = focal_loss(ours, labels, is_counted, alpha, gamma)
    assert relative(expected, found) < 1e-9
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert relative(theirs.grad, ours.grad) < 1e-8
    assert ours.grad[~is_counted].eq(0).all()


def test_its_gradient_is_that_of_finite_differences():
    logits, labels, is_counted = pairs(2, 6, 3)
    logits = (logits / 5).requires_grad_()
    torch.autograd.gradcheck(lambda x: focal_loss(x, labels, is_counted, 0.25, 2.0), logits)


def test_one_pair_is_that_of_hand_arithmetic():
    logits = torch.tensor([[[0.0]]])
    shown = focal_loss(logits, torch.tensor([[0]]), torch.tensor([[True]]), 0.25, 2.0)
    other = focal_loss(logits, torch.tensor([[-1]]), torch.tensor([[True]]), 0.25, 2.0)
    # p is a half: 0.25 * 0.5^2 * log 2, and 0.75 of the same
    assert shown.item() == pytest.approx(0.0433217, rel=1e-5)
    assert other.item() == pytest.approx(3 * 0.0433217, rel=1e-5)


@pytest.mark.parametrize("edge", [-1000.0, 1000.0])
def test_extreme_logits_give_finite_sums_and_gradients(edge):
    logits = torch.full((1, 2, 3), edge, requires_grad=True)
    found = focal_loss(logits, torch.tensor([[1, -1]]), torch.ones(1, 2, dtype=torch.bool), 0.25, 2.0)
    found.sum().backward()
    assert found.isfinite().all()
    assert logits.grad.isfinite().all()


def test_bfloat16_logits_are_summed_in_float32_and_get_bfloat16_gradients():
    logits, labels, is_counted = pairs()
    logits = (logits / 10).bfloat16()
    exact, rough = logits.double().requires_grad_(), logits.clone().requires_grad_()
    expected, found = (focal_loss(x, labels, is_counted, 0.25, 2.0) for x in (exact, rough))
    assert found.dtype == torch.float32
    assert relative(expected.float(), found) < 1e-5
    expected.sum().backward()
    found.sum().backward()
    assert rough.grad.dtype == torch.bfloat16
    assert relative(exact.grad, rough.grad.double()) < 1e-2


def test_nothing_but_the_logits_is_kept_for_the_backward():
    logits, labels, is_counted = pairs()
    logits = logits.float().requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        focal_loss(logits, labels, is_counted, 0.25, 2.0)
    assert sorted(kept) == [labels.numel(), labels.numel(), logits.numel()]


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)])
def test_no_images_and_no_anchors_have_sums_of_nothing(shape):
    logits = torch.zeros(shape, requires_grad=True)
    labels = torch.zeros(shape[:2], dtype=torch.int64)
    found = focal_loss(logits, labels, torch.ones(shape[:2], dtype=torch.bool), 0.25, 2.0)
    found.sum().backward()
    assert found.shape == shape[:1]
    assert found.eq(0).all()
    assert logits.grad.shape == shape
