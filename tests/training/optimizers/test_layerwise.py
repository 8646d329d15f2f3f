"""LARS and LAMB against arithmetic by hand and against timm's."""

import math

import pytest
import timm.optim
import torch
from torch import Tensor, nn

from factories import tiny_detector
from megdet.recipe import Optimizer
from megdet.training.optimizers.layerwise import Lamb, Lars
from megdet.training.optimizers.optimizer import make_optimizer


def step(optimizer: torch.optim.Optimizer, weight: Tensor, gradient: list[float], rate: float) -> list[float]:
    weight.grad = torch.tensor(gradient, dtype=weight.dtype)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return weight.tolist()


def group(weight: Tensor, decay: float, adapts: bool = True) -> list[dict[str, object]]:
    return [{"params": [weight], "weight_decay": decay, "adapts": adapts, "module": "m"}]


def test_two_steps_of_lars_by_hand():
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))  # of length 5
    lars = Lars(group(weight, 0.1), momentum=0.9, trust_coefficient=0.02)
    # |g| = 1.5, so the ratio is 0.02 * 5 / (1.5 + 0.1 * 5) = 0.05; g + 0.1 w = (1.8, 0.4)
    assert step(lars, weight, [1.5, 0.0], 2.0) == pytest.approx([3 - 0.18, 4 - 0.04])
    # the momentum holds the rate of its own step: v = 0.9 v + 1 * ratio * (0, 1) + decay
    length = math.hypot(2.82, 3.96)
    ratio = 0.02 * length / (1.0 + 0.1 * length)
    wanted = [2.82 - (0.9 * 0.18 + ratio * 0.282), 3.96 - (0.9 * 0.04 + ratio * (1 + 0.396))]
    assert step(lars, weight, [0.0, 1.0], 1.0) == pytest.approx(wanted)


def test_a_step_of_lamb_by_hand():
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    lamb = Lamb(group(weight, 0.5), betas=(0.9, 0.99), eps=0.0)
    # without bias the first step of Adam is the sign of the gradient: u = (1, -1) + 0.5 w = (2.5, 1)
    stride = 5 / math.hypot(2.5, 1.0)
    wanted = [3 - 0.1 * stride * 2.5, 4 - 0.1 * stride]
    assert step(lamb, weight, [7.0, -0.01], 0.1) == pytest.approx(wanted)


@pytest.mark.parametrize("kind", [Lars, Lamb])
def test_norms_and_biases_and_weights_of_no_length_have_no_trust_ratio(kind):
    options = {"momentum": 0.9, "trust_coefficient": 0.5} if kind is Lars else {"betas": (0.9, 0.999), "eps": 0.0}
    for start, adapts in (([3.0, 4.0], False), ([0.0, 0.0], True)):
        weight = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        moved = step(kind(group(weight, 0.0, adapts), **options), weight, [1.0, 1.0], 0.25)
        assert moved == pytest.approx([value - 0.25 for value in start])


@pytest.mark.parametrize("start", [[3.0, 4.0], [0.0, 0.0]])
@pytest.mark.parametrize("kind", [Lars, Lamb])
def test_a_gradient_of_zero_moves_nothing_without_decay(kind, start):
    options = {"momentum": 0.9, "trust_coefficient": 0.5} if kind is Lars else {"betas": (0.9, 0.999), "eps": 1e-6}
    weight = nn.Parameter(torch.tensor(start))
    assert step(kind(group(weight, 0.0), **options), weight, [0.0, 0.0], 0.25) == start


def test_lamb_is_timms():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2))
    with torch.no_grad():
        theirs.copy_(ours)
    lamb = Lamb(group(ours, 0.01), betas=(0.9, 0.999), eps=1e-6)
    reference = timm.optim.Lamb([theirs], lr=0.02, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, max_grad_norm=None)
    for _ in range(5):
        gradient = torch.randn(4, 3, dtype=torch.float64)
        theirs.grad = gradient.clone()
        reference.step()
        step(lamb, ours, gradient.tolist(), 0.02)
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_rate_on_the_device_is_as_good_as_a_number(kind):
    found = []
    for rate in (0.125, torch.tensor(0.125)):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = make_optimizer(model, Optimizer(kind=kind, weight_decay=0.01))
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            for own in optimizer.param_groups:
                own["lr"] = rate
            optimizer.step()
        found.append(model.weight.detach().clone())
    assert torch.equal(*found)


def test_the_groups_of_a_detector_are_its_modules_layers_apart_from_norms_and_biases():
    detector = tiny_detector()
    groups = make_optimizer(detector, Optimizer(kind="lars")).param_groups
    names = {parameter: name for name, parameter in detector.named_parameters()}
    assert {own["module"] for own in groups} == {"backbone", "fpn", "rpn", "box_head"}
    assert len({(own["module"], own["adapts"]) for own in groups}) == len(groups)
    for own in groups:
        for parameter in own["params"]:
            assert names[parameter].startswith(f"{own['module']}.")
            assert own["adapts"] == (parameter.ndim > 1)
