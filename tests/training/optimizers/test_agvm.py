"""AGVM by hand."""

import math

import pytest
import torch
from torch import nn

from megdet.recipe import Optimizer
from megdet.training.optimizers.agvm import Agvm
from megdet.training.optimizers.optimizer import make_optimizer
from megdet.training.optimizers.parts import parts_of


def make(kind: str = "sgd", warmup_steps: int = 4) -> tuple[Agvm, nn.ModuleDict]:
    """A backbone, a neck and a head of two numbers each."""
    model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("backbone", "fpn", "rpn")}).double()
    optimizer = make_optimizer(model, Optimizer(kind=kind))
    parameters = list(model.parameters())[::-1]
    agvm = Agvm(parts_of(model, parameters), "backbone", parameters, optimizer, warmup_steps, torch.device("cpu"))
    return agvm, model


def gradients(**by_module: tuple[float, float]) -> list[torch.Tensor]:
    """In the order of the parameters, the last module first."""
    return [torch.tensor([by_module[name]], dtype=torch.float64) for name in ("rpn", "fpn", "backbone")]


FIRST = gradients(backbone=(1, 0), fpn=(2, 0), rpn=(3, 4))
SECOND = gradients(backbone=(0, 5), fpn=(-1, 0), rpn=(3, 4))
# cosines 0, -1 and 1: v = 1, 2 and 0; s = 1, sqrt(1/2) and, clipped, sqrt(10)
FACTORS = [1.0, 0.97 + 0.03 * math.sqrt(1 / 2), 0.97 + 0.03 * math.sqrt(10)]


def test_the_factors_by_hand():
    agvm, _ = make()
    disagreements, factors = agvm.update(FIRST, SECOND).tolist()
    assert list(agvm.parts) == ["backbone", "fpn", "rpn"]
    assert disagreements == pytest.approx([1, 2, 0])
    assert factors == pytest.approx(FACTORS, rel=1e-6)
    again = agvm.update(FIRST, SECOND)[1].tolist()
    assert again == pytest.approx([0.97 * f + (f - 0.97) for f in FACTORS], rel=1e-6)


def test_a_gradient_that_is_not_finite_leaves_the_factors_as_they_are():
    agvm, _ = make()
    agvm.update(FIRST, SECOND)
    before = agvm.factors.clone()
    agvm.update(FIRST, gradients(backbone=(0, 5), fpn=(math.nan, 0), rpn=(3, math.inf)))
    assert torch.equal(agvm.factors, before)


def test_the_factors_do_not_fall_below_the_clip():
    agvm, _ = make()
    agree, oppose = (
        gradients(backbone=(1, 0), fpn=(1, 0), rpn=(1, 0)),
        gradients(backbone=(1, 0), fpn=(0, 1), rpn=(0, 0)),
    )
    # v of the backbone is 0, of the others 1 (a gradient of zero agrees with none): ratios of 1e-6, clipped at 0.5
    assert agvm.update(agree, oppose)[1].tolist() == pytest.approx([1, *[0.97 + 0.03 * math.sqrt(0.5)] * 2])


def test_a_module_has_its_factor_of_the_scheduled_rate_at_every_step():
    agvm, _ = make()
    agvm.set_rates(0.5)
    assert {group["module"]: float(group["lr"]) for group in agvm.optimizer.param_groups} == {
        "backbone": 0.5,
        "fpn": 0.5,
        "rpn": 0.5,
    }
    agvm.update(FIRST, SECOND)
    agvm.set_rates(0.1)
    rates = [float(group["lr"]) for group in agvm.optimizer.param_groups]
    assert rates == pytest.approx([0.1 * factor for factor in FACTORS], rel=1e-6)


def test_it_measures_on_the_first_step_after_warmup_and_every_ten():
    agvm, _ = make(warmup_steps=4)
    assert [step for step in range(30) if agvm.is_due(step)] == [4, 14, 24]


def test_under_adamw_a_gradient_counts_over_the_root_of_its_second_moment():
    agvm, model = make("adamw")
    # before the first step the moment is the halves' mean square: numbers of one size count as their signs
    mixed = gradients(backbone=(1, 100), fpn=(1, 100), rpn=(1, 100))
    turned = gradients(backbone=(1, -100), fpn=(1, 100), rpn=(-1, -100))
    assert agvm.update(mixed, turned)[0].tolist() == pytest.approx([1, 0, 2], abs=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.tensor([[3.0, 300.0]], dtype=torch.float64)
    agvm.optimizer.step()
    ours, theirs = ([4.0, 200.0], [2.0, -100.0])  # almost opposite as they are

    def normalised(gradient: list[float]) -> list[float]:
        moments = [0.001 * 3.0**2, 0.001 * 300.0**2]
        return [g / (math.sqrt(v) + 1e-8) for g, v in zip(gradient, moments, strict=True)]

    a, b = normalised(ours), normalised(theirs)
    wanted = 1 - (a[0] * b[0] + a[1] * b[1]) / (math.hypot(*a) * math.hypot(*b))
    given = [gradients(backbone=tuple(g), fpn=tuple(g), rpn=tuple(g)) for g in (ours, theirs)]
    assert agvm.update(*given)[0].tolist() == pytest.approx([wanted] * 3, rel=1e-6)
    assert 0.1 < wanted < 1.5


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_factors_do_not_depend_on_clipping(kind):
    """A clipped gradient is a fraction of the raw one, in both halves and in what the optimizer has seen."""
    found = []
    for clipping in (1.0, 0.01):
        agvm, model = make(kind)
        for parameter in model.parameters():
            parameter.grad = clipping * torch.tensor([[3.0, 300.0]], dtype=torch.float64)
        agvm.optimizer.step()
        found.append(agvm.update(FIRST, SECOND)[0].tolist())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_its_numbers_have_names():
    agvm, _ = make()
    named = agvm.named(agvm.update(FIRST, SECOND).tolist())
    assert named["fpn"] == {"disagreement": pytest.approx(2), "rate_factor": pytest.approx(FACTORS[1], rel=1e-6)}
