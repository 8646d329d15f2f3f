"""The gradient noise scale, where G and Sigma are known."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from factories import TINY
from megdet.recipe import Recipe
from megdet.training.optimizers.noise_scale import NoiseScale

CPU = torch.device("cpu")
PARTS = {"backbone": [1], "rpn": [0]}
TRUE = [torch.tensor([0.5, -1.0, 2.0]), torch.tensor([3.0])]
"""|G|^2 is 9 in the backbone and 5.25 in the RPN"""
DEVIATION = [2.0, 0.5]
"""of every number of an image's gradient: tr(Sigma) is 0.25 in the backbone and 3 * 4 in the RPN"""


def recipe(batch_size: int, group_size: int, interval: int = 1) -> Recipe:
    return replace(TINY, batch_size=batch_size, bn_size=group_size, noise_interval=interval)


def image_gradients(count: int, seed: int) -> list[Tensor]:
    """One row an image, a tensor a parameter."""
    generator = torch.Generator().manual_seed(seed)
    return [
        mean + deviation * torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
        for mean, deviation in zip(TRUE, DEVIATION, strict=True)
    ]


def measured(batch_size: int, group_size: int, seed: int) -> Tensor:
    noise = NoiseScale(PARTS, {}, recipe(batch_size, group_size), CPU)
    rows = image_gradients(batch_size, seed)
    groups = batch_size // group_size
    first = group_size * (groups - groups // 2)
    halves = ([r[part].sum(0) / batch_size for r in rows] for part in (slice(first), slice(first, None)))
    return noise.of_halves(*halves, step=0)


@pytest.mark.parametrize(("batch_size", "group_size"), [(8, 2), (6, 2), (6, 1)])
def test_both_estimators_have_no_bias_for_equal_and_unequal_halves(batch_size, group_size):
    found = torch.stack([measured(batch_size, group_size, seed)[:2] for seed in range(2000)])
    mean, error = found.mean(0), found.std(0) / math.sqrt(len(found))
    wanted = torch.tensor([[9, 5.25, 14.25], [0.25, 12, 12.25]], dtype=torch.float64)
    assert bool(((mean - wanted).abs() < 4 * error).all()), (mean, wanted, error)
    assert bool((error < 0.07 * wanted).all())


def test_equal_halves_give_the_estimators_of_the_paper():
    noise = NoiseScale(PARTS, {}, recipe(8, 2), CPU)
    rows = image_gradients(8, seed=1)
    first, second = ([r[part].mean(0) for r in rows] for part in (slice(4), slice(4, 8)))
    found = noise.of_halves([g / 2 for g in first], [g / 2 for g in second], step=0)
    gradient_sq, variance = found[:2, -1].tolist()
    # Appendix A.1 with B_small 4 and B_big 8
    small = sum(float((g**2).sum()) for g in (*first, *second)) / 2
    big = sum(float((((a + b) / 2) ** 2).sum()) for a, b in zip(first, second, strict=True))
    assert gradient_sq == pytest.approx((8 * big - 4 * small) / (8 - 4))
    assert variance == pytest.approx((small - big) / (1 / 4 - 1 / 8))


def test_two_successive_steps_of_one_group_are_compared_where_the_interval_ends():
    noise = NoiseScale(PARTS, {}, recipe(4, 4, interval=3), CPU)
    assert not noise.compares_halves
    steps = [[t + 0.1 * step for t in TRUE] for step in range(7)]
    found = {step: noise.of_steps(gradients, step) for step, gradients in enumerate(steps)}
    assert [step for step, own in found.items() if own is not None] == [2, 5]
    third = found[2]
    assert third is not None
    # <g1, g2> in the backbone is 3.1 * 3.2; the difference is 0.1 in four numbers, over 1/4 + 1/4
    assert third[0].tolist()[0] == pytest.approx(3.1 * 3.2)
    assert third[1].tolist() == pytest.approx([0.01 * 2, 0.03 * 2, 0.04 * 2], rel=1e-4)
    named = [noise.named(own.tolist()) for own in found.values() if own is not None]
    assert [(own["estimator"], own["measurements"]) for own in named] == [
        ("successive steps", 1),
        ("successive steps", 2),
    ]
    assert noise.kept == []


def test_what_is_kept_does_not_change_when_the_gradient_is_clipped():
    noise = NoiseScale(PARTS, {}, recipe(4, 4, interval=2), CPU)
    gradients = [t.clone() for t in TRUE]
    noise.of_steps(gradients, 0)
    for gradient in gradients:
        gradient.mul_(0)
    assert all(torch.equal(*pair) for pair in zip(noise.kept, TRUE, strict=True))


def test_the_scale_is_the_ratio_of_the_averages_and_infinite_where_no_gradient_is_seen():
    noise = NoiseScale(PARTS, {}, recipe(4, 2), CPU)
    one, other = [torch.ones(3), torch.ones(1)], [-torch.ones(3), torch.ones(1)]
    first = noise.of_halves(one, other, 0)
    # means are twice the sums: in the backbone <g, g> = 4 and no difference, in the RPN -12 and |(4, 4, 4)|^2 = 48
    assert first.tolist() == [[4, -12, -8], [0, 48, 48], [0, math.inf, math.inf], [1, 1, 1]]
    second = noise.of_halves(one, one, 1)  # 4, 12 and 16, no variance
    weights = 0.05 * 0.95, 0.05
    wanted = weights[0] * 48 / (weights[1] * 16 - weights[0] * 8)
    assert second[2].tolist() == pytest.approx([0, weights[0] * 48 / (0.05 * 12 - weights[0] * 12), wanted])


def test_it_measures_after_every_interval():
    noise = NoiseScale(PARTS, {}, recipe(4, 2, interval=5), CPU)
    assert [step for step in range(20) if noise.is_due(step)] == [4, 9, 14, 19]


@pytest.mark.parametrize(("batch_size", "interval"), [(8, 1), (8, 3), (4, 1), (4, 2), (4, 3)])
def test_what_it_counts_is_what_it_has_measured(batch_size, interval):
    noise = NoiseScale(PARTS, {}, recipe(batch_size, 4, interval), CPU)
    done = 0
    for step in range(8):
        if not noise.compares_halves:
            found = noise.of_steps(TRUE, step)
        else:
            found = noise.of_halves(TRUE, TRUE, step) if noise.is_due(step) else None
        done += found is not None
        assert noise.num_measured(step) == done
        assert found is None or noise.named(found.tolist())["measurements"] == done


def test_its_numbers_have_names():
    noise = NoiseScale(PARTS, {}, recipe(4, 2), CPU)
    named = noise.named([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [2.0, 2.0, 2.0]])
    assert named == {
        "estimator": "halves",
        "measurements": 2,
        "backbone": {"gradient_sq": 1.0, "variance": 4.0, "scale": 7.0},
        "rpn": {"gradient_sq": 2.0, "variance": 5.0, "scale": 8.0},
        "model": {"gradient_sq": 3.0, "variance": 6.0, "scale": 9.0},
    }
