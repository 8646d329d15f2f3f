"""The learning-rate test: its rules by hand, and tiny runs."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from divergence import losses_times
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.studies.rates.picture import plot_rate_test
from megdet.studies.rates.trial import (
    Course,
    RateTest,
    Stability,
    first_divergence,
    read_range,
    run_rate_test,
    smooth,
    stability_rates,
)
from megdet.training import run as run_module
from megdet.training.run import RunOptions
from megdet.training.schedule import learning_rate
from megdet.training.step import StepResult, train_step
from small_runs import ALONE, four_images_a_step


def test_a_loss_that_is_not_finite_has_diverged_at_once() -> None:
    assert first_divergence([3.0, 2.0, math.nan, 1.0]) == 3
    assert first_divergence([math.inf]) == 1


def test_a_running_mean_of_twice_its_lowest_has_diverged() -> None:
    # after ten losses of 1 the mean is 1; one of 10 makes it (0.9 (1 - 0.9^10) + 0.1 x 10) / (1 - 0.9^11) = 2.31
    assert first_divergence([1.0] * 10 + [10.0]) == 11
    assert first_divergence([1.0] * 10 + [7.0]) is None  # 1.87
    assert first_divergence([5.0, 4.0, 3.0, 2.0, 1.0]) is None


def test_smoothing_takes_as_many_neighbours_on_both_sides() -> None:
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0, 6.0, 4.0, 8.0]), 2), [1, 3, 21 / 5, 6, 8])
    line = np.linspace(3.0, 1.0, 11)
    np.testing.assert_allclose(smooth(line, 3), line)  # no lag


def course_of(losses: list[float], diverged: int | None = None) -> Course:
    rates = [1e-4 * 10 ** (step / 10) for step in range(len(losses))]
    return Course(tuple(rates), tuple(losses), diverged)


def test_the_recommended_rate_is_that_of_the_lowest_loss() -> None:
    valley = [abs(step - 25) / 10 + 1.0 for step in range(40)]
    found = read_range(course_of(valley))
    assert found.lowest == found.recommended == pytest.approx(1e-4 * 10**2.5)
    assert found.highest is None


def test_the_recommended_rate_stays_a_tenth_of_the_one_that_diverged() -> None:
    cliff = [3.0 - step / 20 for step in range(40)] + [math.nan]
    found = read_range(course_of(cliff, 41))
    assert found.highest == pytest.approx(1.0)
    assert found.recommended == pytest.approx(0.1)
    assert len(found.smoothed) == 40


def test_the_steepest_fall_is_over_the_logarithm_of_the_rate() -> None:
    steps = np.arange(60)
    found = read_range(course_of((2 - np.tanh((steps - 20) / 4)).tolist()))
    assert found.steepest == pytest.approx(1e-4 * 10**2)


def test_a_range_that_diverges_at_once_is_refused() -> None:
    with pytest.raises(InputError, match=r"diverged at its step 3, rate 0\.000158: choose a lower --from"):
        read_range(course_of([3.0, 30.0, math.nan], 3))


def test_a_stability_run_has_the_warmup_of_the_schedule() -> None:
    recipe = Recipe(batch_size=32, bn_size=16)
    rates = stability_rates(recipe, 1000, 0.1, 4, 3)
    assert rates == pytest.approx([0.1, 0.125, 0.15, 0.175, 0.2, 0.2, 0.2])
    own = replace(recipe, schedule=replace(recipe.schedule, warmup_steps=4))
    assert stability_rates(own, 1000, 0.02, 4, 3) == [learning_rate(own, 1000, step) for step in range(7)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return four_images_a_step(tmp_path_factory.mktemp("data"), 8)


def test_a_warmup_that_does_nothing_is_not_tried_and_the_advice_says_so(recipe: Recipe) -> None:
    flat = replace(recipe, schedule=replace(recipe.schedule, warmup_start=1.0))  # 4 images: r is four times their rate
    options = RunOptions(workers=0)
    found = run_rate_test(flat, ALONE, options, lowest=1e-3, highest=1e-2, steps=20, rates=[0.005], after=1)
    assert [run.warmup_steps for run in found.stability] == [0]
    assert found.sentence().endswith("set schedule.warmup_start below 0.25 for a warmup.")
    assert "schedule.warmup_steps 2 does nothing" in found.as_dict()["no_warmup"]
    asked = run_rate_test(
        flat, ALONE, options, lowest=1e-3, highest=1e-2, steps=20, rates=[0.005], warmups=[2], after=1
    )
    assert [run.course.rates for run in asked.stability] == [(0.005,) * 3]
    assert "schedule.warmup_steps 2 does nothing" in asked.no_warmup


def rates_of(world: World, recipe: Recipe) -> RateTest:
    options = RunOptions(workers=0)
    return run_rate_test(
        recipe, world, options, lowest=1e-3, highest=1e3, steps=20, rates=[0.005, 500.0], warmups=[0, 2], after=3
    )


@pytest.fixture(scope="module")
def found(recipe: Recipe) -> RateTest:
    return rates_of(ALONE, recipe)


def test_a_range_test_of_a_detector_rises_geometrically_until_it_diverges(found: RateTest) -> None:
    course = found.range_test.course
    assert course.diverged is not None
    assert len(course.losses) == len(course.rates) == course.diverged < 20
    factors = [after / before for before, after in itertools.pairwise(course.rates)]
    assert factors == pytest.approx([10 ** (6 / 19)] * len(factors))
    assert course.rates[0] == pytest.approx(1e-3)
    assert found.range_test.highest == course.rates[-1]


def test_a_low_rate_survives_and_a_mad_one_does_not(found: RateTest) -> None:
    assert [(run.rate, run.warmup_steps, run.survives) for run in found.stability] == [
        (0.005, 0, True),
        (0.005, 2, True),
        (500.0, 0, False),
        (500.0, 2, False),
    ]
    assert len(found.stability[1].course.losses) == 5
    assert found.stability[0].base_lr == pytest.approx(0.005 * 16 / 4)
    assert found.recommended_base_lr == pytest.approx(found.range_test.recommended * 4)


def test_every_short_run_starts_from_the_same_weights(found: RateTest) -> None:
    first = {course.losses[0] for course in [found.range_test.course, *(run.course for run in found.stability)]}
    assert len(first) == 1


def test_a_gradient_that_is_not_finite_has_diverged(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(*arguments: Any) -> StepResult:
        is_broken = arguments[4] == 2 and arguments[3] == 0.005  # the third step of the stability run
        with losses_times(arguments[0], math.inf if is_broken else 1.0):
            return train_step(*arguments)

    monkeypatch.setattr(run_module, "train_step", overflowing)
    options = RunOptions(workers=0)
    found = run_rate_test(
        recipe, ALONE, options, lowest=1e-3, highest=1e-2, steps=20, rates=[0.005], warmups=[0], after=4
    )
    assert found.range_test.course.diverged is None
    [run] = found.stability
    assert (run.survives, run.course.diverged, run.course.losses[-1]) == (False, 3, math.inf)


def test_agvm_waits_for_the_warmup_of_the_short_run(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    # a warmup of 500 steps would leave it out of all of them
    agvm = replace(
        recipe,
        optimizer=replace(recipe.optimizer, agvm=True),
        schedule=replace(recipe.schedule, warmup_steps=500),
    )
    measured: list[int] = []

    def counting(*arguments: Any) -> StepResult:
        result = train_step(*arguments)
        if result.agvm is not None:
            measured.append(result.step)
        return result

    monkeypatch.setattr(run_module, "train_step", counting)
    options = RunOptions(workers=0)
    run_rate_test(agvm, ALONE, options, lowest=1e-3, highest=1e-2, steps=20, rates=[0.005], warmups=[0, 3], after=1)
    assert measured == [0, 10, 0, 3]  # twice in the range test, once in each stability run


@pytest.mark.distributed
def test_two_ranks_find_the_same(recipe: Recipe, found: RateTest) -> None:
    for other in run_in_ranks(rates_of, 2, recipe):
        before = found.range_test.course.losses[:8]
        assert other.range_test.course.losses[:8] == pytest.approx(before, rel=1e-9)
        assert other.recommended_base_lr == pytest.approx(found.recommended_base_lr)
        assert [run.survives for run in other.stability] == [run.survives for run in found.stability]


def advice(*runs: tuple[float, int, int | None], no_warmup: str = "") -> str:
    test = read_range(course_of([abs(step - 25) / 10 + 1.0 for step in range(40)]))
    stability = [
        Stability(rate or test.recommended, rate or 0.25, warmup, course_of([1.0] * 10, diverged))
        for rate, warmup, diverged in runs
    ]
    return RateTest(16, 1.0, test, tuple(stability), no_warmup).sentence()


def test_the_advice_says_which_warmup_the_recommended_rate_needs() -> None:
    assert "did not diverge: raise --to" in advice()
    assert "survives from a warmup of 100 steps on" in advice((0, 0, 3), (0, 100, None), (0, 200, None))
    assert "survives none of these warmups" in advice((0, 0, 3))
    assert "or optimizer.base_lr 0.01, which did survive" in advice((0, 0, 3), (0.01, 0, None))


def test_the_advice_names_no_length_of_a_warmup_that_does_nothing() -> None:
    assert advice((0, 0, None), no_warmup="none").endswith("It survives. none.")
    diverging = advice((0, 0, 3), (0.01, 0, None), no_warmup="none")
    assert diverging.endswith("It does not survive: try optimizer.base_lr 0.01, which did. none.")
    assert advice((0, 0, 3), no_warmup="none").endswith("It does not survive: lower --rates. none.")


def test_a_test_with_a_run_that_diverged_is_drawn(found: RateTest, tmp_path: Path) -> None:
    plot_rate_test(found, "tiny", tmp_path / "a" / "lr-test.png")
    assert (tmp_path / "a" / "lr-test.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lowest": 0.0}, "--from 0 --to 1: the first must be above 0"),
        ({"lowest": 2.0}, "--from 2 --to 1"),
        ({"highest": math.inf}, "--from 0.1 --to inf"),
        ({"steps": 5}, "--steps 5: a range test takes at least 20"),
        ({"after": 0}, "--after 0"),
        ({"rates": [0.1, -1.0]}, "--rates: they must be above 0"),
    ],
)
def test_numbers_that_make_no_test_are_refused(recipe: Recipe, changes: dict[str, object], words: str) -> None:
    options = {"lowest": 0.1, "highest": 1.0, "steps": 20} | changes
    with pytest.raises(InputError) as refused:
        run_rate_test(recipe, ALONE, RunOptions(workers=0), **options)
    assert words in str(refused.value)
