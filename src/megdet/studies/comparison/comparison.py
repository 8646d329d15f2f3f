"""Whether runs differ by more than noise: the noise of the evaluation images, and the noise of the seeds.

**Images.** The paired bootstrap (`evaluation.resampling`) scores both runs on the same draws of the images. Its
interval is for these weights on other images of the same kind. **Seeds.** Runs of one recipe that differ only in `seed`
are one group; Welch's t over the groups is for the recipes. A difference counts if every known interval excludes 0.
With more than two groups, each is compared with the first, at a level that holds for all comparisons together
(Bonferroni).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from megdet.errors import InputError
from megdet.evaluation.counting import Kind
from megdet.evaluation.resampling import average_precisions, draw_images, interval, mean_ap
from megdet.studies.comparison.recipes import differences, recipe_identity
from megdet.studies.comparison.runs import ScoredRun, check_same_images
from megdet.studies.comparison.student import pooled_deviation, seeds_needed, welch_interval
from megdet.studies.comparison.verdict import Verdict, judge

RESAMPLES = 1000
LEVEL = 0.95
Interval = tuple[float, float]


@dataclass(frozen=True)
class RunScore:
    """A run and its numbers, 0..1, -1 if the ground truth has no such object."""

    name: str
    group: str
    seed: int
    AP: float
    AP50: float
    AP75: float
    AR100: float
    over_images: Interval
    """interval of AP on other images of the same kind"""


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with different seeds."""

    name: str
    runs: list[str]
    seeds: list[int]
    AP: float
    """mean AP over its seeds"""
    deviation: float | None
    """standard deviation of AP over its seeds; None with one seed"""


@dataclass(frozen=True)
class Difference:
    """A group minus the first group."""

    first: str
    second: str
    AP: float
    over_images: Interval
    over_seeds: Interval | None
    """None with fewer than two seeds in a group"""
    seeds_needed: int | None
    """seeds of each group needed to find a difference of this size in 8 of 10 cases; None if not known"""
    verdict: Verdict
    words: str


@dataclass(frozen=True)
class Comparison:
    """The whole comparison."""

    kind: Kind
    images: int
    resamples: int
    level: float
    """confidence level of each interval of a difference"""
    runs: list[RunScore]
    groups: list[Group]
    recipe_differences: dict[str, list[Any]]
    """key of the recipe -> its value in the first run of each group"""
    differences: list[Difference]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare_runs(
    runs: Sequence[ScoredRun], kind: Kind = "bbox", *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Compare runs that were evaluated on the same images. Raises InputError if they were not, or for a single run."""
    if len(runs) < 2:
        raise InputError("one run cannot be compared: name two or more")
    check_same_images(runs)
    grouped = _grouped(runs)
    draws = draw_images(len(runs[0].task.image_ids), resamples, seed)
    resampled = {run.name: mean_ap(average_precisions(run.matches(kind), draws)) for run in runs}
    scores = {run.name: _score(run, kind, _name(grouped, run), resampled[run.name]) for run in runs}
    groups = [_group(name, own, scores) for name, own in grouped.items()]
    level = 1 - (1 - LEVEL) / (len(groups) - 1)
    return Comparison(
        kind,
        draws.shape[1],
        resamples,
        level,
        [*scores.values()],
        groups,
        _recipe_differences(grouped),
        [_difference(groups[0], other, grouped, scores, resampled, level) for other in groups[1:]],
    )


def _grouped(runs: Sequence[ScoredRun]) -> dict[str, list[ScoredRun]]:
    """Runs by their recipe, under the letters A, B, ...; if all have one recipe, each run is its own group."""
    found: dict[Any, list[ScoredRun]] = {}
    for run in runs:
        found.setdefault(recipe_identity(run.recipe), []).append(run)
    lists = [*found.values()] if len(found) > 1 else [[run] for run in runs]
    return {_letters(index): own for index, own in enumerate(lists)}


def _recipe_differences(grouped: dict[str, list[ScoredRun]]) -> dict[str, list[Any]]:
    found = differences([own[0].recipe for own in grouped.values()])
    if any(len(own) > 1 for own in grouped.values()):
        found.pop("seed", None)  # it differs within the groups too
    return found


def _letters(index: int) -> str:
    """A to Z, then AA, AB, ..."""
    before, last = divmod(index, 26)
    return (_letters(before - 1) if before else "") + chr(ord("A") + last)


def _name(grouped: dict[str, list[ScoredRun]], run: ScoredRun) -> str:
    return next(name for name, own in grouped.items() if run in own)


def _score(run: ScoredRun, kind: Kind, group: str, resampled: Float[np.ndarray, " resamples"]) -> RunScore:
    run.sides(kind)
    told = run.evaluation.bbox if kind == "bbox" else run.evaluation.segm
    assert told is not None, "the sides are there, so the numbers are"
    numbers = (told.AP, told.AP50, told.AP75, told.AR100)
    return RunScore(run.name, group, run.recipe.seed, *numbers, interval(resampled, LEVEL, told.AP))


def _by_seed(names: Sequence[str], scores: dict[str, RunScore]) -> dict[int, float]:
    """Seed -> mean AP of its runs: repeating a recipe with the same seed gives no second sample."""
    found: dict[int, list[float]] = {}
    for name in names:
        found.setdefault(scores[name].seed, []).append(scores[name].AP)
    return {seed: float(np.mean(values)) for seed, values in found.items()}


def _group(name: str, runs: Sequence[ScoredRun], scores: dict[str, RunScore]) -> Group:
    names = [run.name for run in runs]
    by_seed = _by_seed(names, scores)
    values = [*by_seed.values()]
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Group(name, names, sorted(by_seed), float(np.mean(values)), deviation)


def _difference(
    first: Group,
    second: Group,
    grouped: dict[str, list[ScoredRun]],
    scores: dict[str, RunScore],
    resampled: dict[str, Float[np.ndarray, " resamples"]],
    level: float,
) -> Difference:
    drawn = _mean_of(second, scores, resampled) - _mean_of(first, scores, resampled)
    difference = second.AP - first.AP
    over_images = interval(drawn, level, difference)
    values = [[*_by_seed(group.runs, scores).values()] for group in (first, second)]
    over_seeds = welch_interval(values[0], values[1], level)
    deviation = pooled_deviation(values)
    needed = None if deviation is None else seeds_needed(difference, deviation, level)
    is_one_recipe = recipe_identity(grouped[first.name][0].recipe) == recipe_identity(grouped[second.name][0].recipe)
    verdict, words = judge(
        (first.name, second.name), difference, over_images, over_seeds, needed, is_one_recipe=is_one_recipe
    )
    return Difference(first.name, second.name, difference, over_images, over_seeds, needed, verdict, words)


def _mean_of(
    group: Group, scores: dict[str, RunScore], resampled: dict[str, Float[np.ndarray, " resamples"]]
) -> Float[np.ndarray, " resamples"]:
    """The mean over the seeds of a group in every resample."""
    by_seed = [
        np.mean([resampled[name] for name in group.runs if scores[name].seed == seed], axis=0) for seed in group.seeds
    ]
    mean: Float[np.ndarray, " resamples"] = np.mean(by_seed, axis=0)
    return mean
