"""The highest learning rate that works: a range test, and stability runs after warmups of several lengths.

The range test (Smith, "Cyclical learning rates for training neural networks", 2015) lets the rate rise geometrically
from step to step until the loss diverges. The recommended rate is that of the lowest smoothed loss, but at most a tenth
of the rate that diverged. The rate of the steepest fall is reported but not recommended: a detector's loss falls
fastest while its new heads learn that most boxes are background, and they learn that at any rate. Every short run
starts from the same weights and takes the same images, the first of the recipe's plan, so the result does not depend on
the devices.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet.distributed.failures import stop_together
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.run_folder.folder import encode_non_finite
from megdet.training.datasets import Datasets, load_datasets
from megdet.training.run import RunOptions, open_run
from megdet.training.schedule import learning_rate, scaled_rate, why_no_warmup
from megdet.training.step import read_results

SMOOTHING = 0.9
"""Decay of the running mean of the losses, by which divergence is detected."""
DIVERGED = 2.0
"""A run has diverged if the running mean is above so many times its lowest value so far."""
SAFETY = 10.0
"""The recommended rate is at least this factor below the one that diverged."""
FEWEST_STEPS = 20
"""Fewest steps of a range test: with fewer a slope means nothing."""
AFTER_WARMUP = 50
"""Steps at the full rate that a stability run has to survive."""

Progress = Callable[[str, int, int], None]
"""Called with the name of a short run, its steps done, and the number of its steps."""


@dataclass(frozen=True)
class Course:
    """The losses of a short run, up to the step that diverged."""

    rates: tuple[float, ...]
    """learning rate of every step"""
    losses: tuple[float, ...]
    diverged: int | None
    """the step, from 1, whose loss was not finite or whose running mean was DIVERGED times its lowest value; a step
    whose update the watch has left out has an infinite loss"""


@dataclass(frozen=True)
class RangeTest:
    """The result of the range test."""

    course: Course
    smoothed: tuple[float, ...]
    """mean of each loss with its neighbours on both sides; it does not lag behind the rate"""
    steepest: float
    """rate at which the smoothed loss falls fastest over the logarithm of the rate"""
    lowest: float
    """rate of the lowest smoothed loss"""
    highest: float | None
    """rate at which the run diverged, None if it did not"""
    recommended: float
    """`lowest`, but at most `highest` / SAFETY"""


@dataclass(frozen=True)
class Stability:
    """One run at a rate after a warmup."""

    rate: float
    base_lr: float
    """the recipe's base_lr that gives this rate"""
    warmup_steps: int
    course: Course

    @property
    def survives(self) -> bool:
        """Whether no step diverged."""
        return self.course.diverged is None

    @property
    def last_loss(self) -> float:
        """Mean loss of the last steps, at most 10."""
        return float(np.mean(self.course.losses[-10:]))


@dataclass(frozen=True)
class RateTest:
    """The result of `megdet lr-test`; rates are for the recipe's mini-batch."""

    batch_size: int
    rate_over_base_lr: float
    """the rate over base_lr by the recipe's scaling rule"""
    range_test: RangeTest
    stability: tuple[Stability, ...]
    no_warmup: str = ""
    """why a warmup would have no effect; empty if it has one"""

    @property
    def recommended_base_lr(self) -> float:
        """The recommended rate as the recipe's optimizer.base_lr."""
        return self.range_test.recommended / self.rate_over_base_lr

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite are strings."""
        stability = [asdict(run) | {"survives": run.survives, "last_loss": run.last_loss} for run in self.stability]
        base_lr = {"recommended_base_lr": self.recommended_base_lr}
        return dict(encode_non_finite({**asdict(self), **base_lr, "stability": stability}))

    def sentence(self) -> str:
        """The recommendation in one line."""
        test = self.range_test
        limit = (
            "did not diverge: raise --to to see where it does"
            if test.highest is None
            else (f"diverged at {test.highest:.3g}")
        )
        advice = (
            f"Recommended: optimizer.base_lr {self.recommended_base_lr:.3g}, a rate of {test.recommended:.3g} for "
            f"{self.batch_size} images (lowest loss at {test.lowest:.3g}; {limit})."
        )
        tried = [run for run in self.stability if run.rate == test.recommended]
        best = max((run.base_lr for run in self.stability if run.survives), default=None)
        if self.no_warmup:
            other = "lower --rates" if best is None else f"try optimizer.base_lr {best:.3g}, which did"
            end = "It survives. " if any(run.survives for run in tried) else f"It does not survive: {other}. "
            return f"{advice} {end if tried else ''}{self.no_warmup}."
        if not tried:
            return advice
        survived = [run.warmup_steps for run in tried if run.survives]
        if survived:
            return f"{advice} It survives from a warmup of {min(survived)} steps on."
        other = "" if best is None else f", or optimizer.base_lr {best:.3g}, which did survive"
        return f"{advice} It survives none of these warmups: try longer ones with --warmup{other}."


def run_rate_test(
    recipe: Recipe,
    world: World,
    options: RunOptions,
    *,
    lowest: float,
    highest: float,
    steps: int,
    rates: Sequence[float] | None = None,
    warmups: Sequence[int] | None = None,
    after: int = AFTER_WARMUP,
    progress: Progress = lambda _what, _done, _of: None,
) -> RateTest:
    """Run both tests; every rank calls it.

    The range goes from `lowest` to `highest` in `steps` steps. A stability run has one of `rates` (default: the
    recipe's own and the recommended one), one of `warmups` in steps (default: 0 and, if it has an effect, the
    recipe's), then `after` steps. Raises InputError for impossible numbers, and for a recipe that cannot be trained.
    """
    if not 0 < lowest < highest < math.inf:
        raise InputError(f"--from {lowest:g} --to {highest:g}: the first must be above 0 and below the second")
    if steps < FEWEST_STEPS:
        raise InputError(f"--steps {steps}: a range test takes at least {FEWEST_STEPS}")
    if after < 1:
        raise InputError(f"--after {after}: it takes at least 1 step at the full rate")
    if rates is not None and any(not 0 < rate < math.inf for rate in rates):
        raise InputError("--rates: they must be above 0")
    with stop_together(world):
        runner = _Runner(recipe, world, options, load_datasets(recipe, world), progress)
        rising = lowest * (highest / lowest) ** (np.arange(steps) / (steps - 1))
        found = read_range(runner.run("range test", rising.tolist(), warmup=0))
        ratio = scaled_rate(replace(recipe, optimizer=replace(recipe.optimizer, base_lr=1.0)))
        longest = max(warmups) if warmups else recipe.schedule.warmup_steps
        no_warmup = why_no_warmup(replace(recipe, schedule=replace(recipe.schedule, warmup_steps=longest)))
        if warmups is None:
            warmups = [0] if no_warmup else sorted({0, longest})
        stability = []
        for rate in rates or sorted({scaled_rate(recipe), found.recommended}):
            for warmup in warmups:
                planned = stability_rates(recipe, len(runner.datasets.train), rate / ratio, warmup, after)
                course = runner.run(f"rate {rate:.3g}, warmup {warmup}", planned, warmup)
                stability.append(Stability(rate, rate / ratio, warmup, course))
    return RateTest(recipe.batch_size, ratio, found, tuple(stability), no_warmup)


def stability_rates(recipe: Recipe, num_images: int, base_lr: float, warmup: int, after: int) -> list[float]:
    """The recipe's warmup in so many steps to the rate of this base_lr, then that rate for `after` steps."""
    schedule = replace(recipe.schedule, policy="step", epochs=1.0, milestones=(), factors=(), warmup_steps=warmup)
    changed = replace(recipe, schedule=schedule, optimizer=replace(recipe.optimizer, base_lr=base_lr))
    return [learning_rate(changed, num_images, step) for step in range(warmup + after)]


def read_range(course: Course) -> RangeTest:
    """The rates of a range test from its losses. Raises InputError if it diverged at once."""
    rates = np.array(course.rates)
    finite = np.isfinite(course.losses)
    if finite.sum() < FEWEST_STEPS // 2:
        raise InputError(
            f"the range test diverged at its step {course.diverged}, rate {rates[-1]:.3g}: choose a lower --from"
        )
    losses = np.array(course.losses)[finite]
    smoothed = smooth(losses, max(1, len(losses) // 20))
    lowest = int(smoothed.argmin())
    slopes = np.gradient(smoothed, np.log(rates[: len(losses)]))
    steepest = float(rates[int(slopes[: max(2, lowest + 1)].argmin())])
    highest = None if course.diverged is None else float(rates[course.diverged - 1])
    best = float(rates[lowest])
    recommended = best if highest is None else min(best, highest / SAFETY)
    return RangeTest(course, tuple(smoothed.tolist()), steepest, best, highest, recommended)


def smooth(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """The mean of each value with its neighbours up to `reach` places away, the same number on both sides."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    places = np.arange(len(values))
    sides = np.minimum(reach, np.minimum(places, len(values) - 1 - places))
    means: NDArray[np.float64] = (sums[places + sides + 1] - sums[places - sides]) / (2 * sides + 1)
    return means


def first_divergence(losses: Iterable[float]) -> int | None:
    """The number, from 1, of the first loss that diverges: not finite, or a running mean above DIVERGED x its lowest.

    The running mean is exponential with decay SMOOTHING, corrected for its start.
    """
    mean, lowest = 0.0, math.inf
    for number, loss in enumerate(losses, 1):
        if not math.isfinite(loss):
            return number
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        corrected = mean / (1 - SMOOTHING**number)
        lowest = min(lowest, corrected)
        if corrected > DIVERGED * lowest:
            return number
    return None


@dataclass
class _Runner:
    """Short runs of a recipe from its start, each on the plan's first steps."""

    recipe: Recipe
    world: World
    options: RunOptions
    datasets: Datasets
    progress: Progress

    def run(self, what: str, rates: Sequence[float], warmup: int) -> Course:
        """Train with these rates until the loss diverges. Every rank makes the same steps, since losses are sums.

        `warmup` is the number of warmup steps, after which AGVM begins to measure; 0 in the range test.
        """
        recipe = replace(self.recipe, schedule=replace(self.recipe.schedule, warmup_steps=warmup))
        losses: list[float] = []
        with open_run(recipe, self.world, self.options, datasets=self.datasets) as run:
            for result in run.steps(0, len(rates), rates.__getitem__):
                numbers = read_results([result], run.trainer)[0]
                losses.append(math.inf if "left_out" in numbers else numbers["loss"])
                done = result.step + 1
                self.progress(what, done, len(rates))
                diverged = first_divergence(losses)
                if diverged is not None:
                    return Course(tuple(rates[:done]), tuple(losses), diverged)
        return Course(tuple(rates), tuple(losses), None)
