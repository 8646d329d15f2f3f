from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megdet.data.plan import TrainingPlan
from megdet.recipe import Optimizer, Recipe, Schedule
from megdet.run_length import total_steps
from megdet.training.schedule import learning_rate, scaled_rate, why_no_warmup

COCO = 115_200
"""images, a multiple of 256: 450 steps an epoch of 256 images, 7,200 of 16"""
LARGE = Recipe(batch_size=256, bn_size=32)


def rate(recipe: Recipe, epoch: float, num_images: int = COCO) -> float:
    return learning_rate(recipe, num_images, round(epoch * num_images / recipe.batch_size))


def test_the_rate_of_the_paper_for_16_and_for_256_images():
    assert scaled_rate(Recipe()) == 0.02
    assert scaled_rate(LARGE) == pytest.approx(0.32)
    assert rate(LARGE, 7) == pytest.approx(0.32)


@pytest.mark.parametrize(
    ("policy", "by_epoch", "end"),
    [
        ("normal", {2: 1, 7.99: 1, 8: 0.1, 9.99: 0.1, 10: 0.01, 10.99: 0.01}, 11),
        ("long", {2: 1, 10.99: 1, 11: 0.1, 13.99: 0.1, 14: 0.01, 16.99: 0.01, 17: 0.005, 17.99: 0.005}, 18),
    ],
)
@pytest.mark.parametrize("recipe", [Recipe(), LARGE])
def test_the_policies_of_the_paper(recipe, policy, by_epoch, end):
    recipe = replace(recipe, schedule=Schedule(policy=policy))
    for epoch, factor in by_epoch.items():
        assert rate(recipe, epoch) == pytest.approx(scaled_rate(recipe) * factor), epoch
    assert total_steps(recipe, COCO) == end * COCO // recipe.batch_size


def test_a_milestone_counts_from_the_first_step_that_starts_in_its_epoch():
    recipe = replace(LARGE, schedule=Schedule(warmup_steps=0))
    assert learning_rate(recipe, 115_000, 3593) == pytest.approx(0.32)  # 3593 * 256 / 115000 = 7.998
    assert learning_rate(recipe, 115_000, 3594) == pytest.approx(0.032)  # 8.0005


def test_warmup_by_hand():
    recipe = replace(LARGE, schedule=Schedule(warmup_steps=4))
    # from r = 0.02 to 0.32 in four steps of 0.075
    assert [learning_rate(recipe, COCO, s) for s in range(6)] == pytest.approx([0.02, 0.095, 0.17, 0.245, 0.32, 0.32])
    gentle = replace(recipe, schedule=Schedule(warmup_steps=4, warmup_start=0.0))
    assert [learning_rate(gentle, COCO, s) for s in range(5)] == pytest.approx([0, 0.08, 0.16, 0.24, 0.32])


def test_exponential_warmup_by_hand():
    recipe = replace(LARGE, schedule=Schedule(warmup_steps=4, warmup="exponential", warmup_start=1.0))
    # from 0.02 to 0.32, sixteen times as much, by a factor of two a step
    assert [learning_rate(recipe, COCO, s) for s in range(6)] == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32, 0.32])
    small = replace(recipe, batch_size=8, bn_size=8)  # starts at its rate, which lies below
    assert {learning_rate(small, COCO, step) for step in range(6)} == {0.01}
    still = replace(recipe, optimizer=Optimizer(base_lr=0.0))
    assert {learning_rate(still, COCO, step) for step in range(6)} == {0.0}


@given(st.floats(0.001, 1), st.integers(1, 40), st.integers(1, 64))
def test_exponential_warmup_rises_by_one_factor(start, steps, batch):
    schedule = Schedule(policy="step", epochs=9.0, warmup="exponential", warmup_steps=steps, warmup_start=start)
    recipe = Recipe(batch_size=16 * batch, schedule=schedule)
    rates = [learning_rate(recipe, COCO, step) for step in range(steps + 1)]
    factors = [after / before for before, after in pairwise(rates)]
    assert factors == pytest.approx([(batch / start) ** (1 / steps)] * steps, rel=1e-9)
    assert rates[-1] == pytest.approx(scaled_rate(recipe))


def test_square_root_scaling_by_hand():
    recipe = replace(LARGE, optimizer=Optimizer(base_lr=0.01, scaling="sqrt"))
    assert scaled_rate(recipe) == pytest.approx(0.04)  # sixteen times the images, four times the rate
    assert scaled_rate(replace(recipe, batch_size=16, bn_size=16)) == 0.01
    assert rate(recipe, 7) == pytest.approx(0.04)


def test_sixteen_images_need_no_warmup():
    assert {learning_rate(Recipe(), COCO, step) for step in range(600)} == {0.02}


@pytest.mark.parametrize(
    ("changes", "flat_until"),
    [
        ({"batch_size": 16}, 1.0),
        ({"batch_size": 8, "bn_size": 8}, 0.5),
        ({"batch_size": 64, "schedule": Schedule(warmup_start=4.0)}, 4.0),
        ({"batch_size": 64, "schedule": Schedule(warmup_start=3.0), "optimizer": Optimizer(scaling="sqrt")}, 2.0),
    ],
)
def test_a_warmup_that_starts_at_its_end_is_said_to_do_nothing_and_from_where_on_it_would(changes, flat_until):
    recipe = Recipe(**changes)
    assert len({learning_rate(recipe, COCO, step) for step in range(600)}) == 1
    assert why_no_warmup(recipe).endswith(f"set schedule.warmup_start below {flat_until:g} for a warmup")
    assert f"schedule.warmup_steps 500 does nothing: {recipe.batch_size} images" in why_no_warmup(recipe)
    lower = replace(recipe, schedule=replace(recipe.schedule, warmup_start=flat_until * 0.99))
    assert learning_rate(lower, COCO, 0) < learning_rate(lower, COCO, 500)
    assert why_no_warmup(lower) == ""


def test_nothing_is_said_of_a_warmup_that_rises_or_was_not_asked_for():
    assert why_no_warmup(Recipe(batch_size=32)) == ""
    assert why_no_warmup(Recipe(schedule=Schedule(warmup_steps=0))) == ""


def test_cosine_falls_along_half_a_cosine_to_almost_nothing():
    recipe = Recipe(schedule=Schedule(policy="cosine", epochs=4.0, warmup_steps=0))
    steps = total_steps(recipe, 1600)
    assert steps == 400
    rates = [learning_rate(recipe, 1600, step) for step in range(steps)]
    assert rates[0] == 0.02
    assert rates[100] == pytest.approx(0.01 * (1 + 2**-0.5))
    assert rates[200] == pytest.approx(0.01)
    assert 0 < rates[-1] < 1e-6
    assert rates == sorted(rates, reverse=True)


def test_policy_step_takes_the_recipes_milestones():
    recipe = Recipe(schedule=Schedule(policy="step", epochs=3.0, milestones=(1.0, 2.5), factors=(0.5, 0.2)))
    recipe = replace(recipe, schedule=replace(recipe.schedule, warmup_steps=0))
    rates = [learning_rate(recipe, 64, step) for step in range(total_steps(recipe, 64))]
    assert rates == pytest.approx([0.02] * 4 + [0.01] * 6 + [0.002] * 2)


@given(st.integers(1, 64), st.sampled_from(["normal", "long", "cosine"]), st.floats(0.001, 1), st.data())
def test_the_rate_after_warmup_is_linear_in_base_rate_and_batch(factor, policy, base_lr, data):
    schedule = Schedule(policy=policy, epochs=7.0 if policy == "cosine" else None, warmup_steps=0)
    one = Recipe(batch_size=16, optimizer=Optimizer(base_lr=base_lr), schedule=schedule)
    many = replace(one, batch_size=16 * factor, bn_size=16)
    images = 16 * factor * 10
    step = data.draw(st.integers(0, total_steps(many, images)))
    ours, theirs = learning_rate(many, images, step), learning_rate(one, images, step * factor)
    assert ours == pytest.approx(factor * theirs, rel=1e-9, abs=1e-12)


@given(st.integers(2, 500), st.integers(1, 30), st.floats(0.1, 20))
def test_the_run_ends_where_the_plan_says_its_last_epoch_ends(num_images, batch, epochs):
    recipe = Recipe(batch_size=batch, bn_size=1, schedule=Schedule(policy="step", epochs=epochs))
    num_images = max(num_images, batch)
    plan = TrainingPlan(np.full((num_images, 2), 10), recipe)
    assert total_steps(recipe, num_images) == plan.epoch_end(epochs)


@pytest.mark.parametrize("batch", [1, 2, 8, 16, 64])
def test_warmup_never_falls(batch):
    recipe = Recipe(batch_size=batch, bn_size=1, schedule=Schedule(warmup_steps=50))
    rates = [learning_rate(recipe, 10_000, step) for step in range(60)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.02 * batch / 16)
