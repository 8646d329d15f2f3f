"""Eq. 4 along a training: the updates of k small mini-batches and of one large one, measured at its kept checkpoints.

The rule is fixed before the runs: of each training the logarithm of the ratio of the two variances is averaged over its
checkpoints; Eq. 4 holds for k if the 90% interval of the mean over the seeds lies within the margin. The measurements
of a training are in `updates.json` of its run folder, so they are made once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from megdet.errors import InputError
from megdet.files import read_json, write_json_atomically
from megdet.paper.claims.rules import Keeps, Verdict, equality_level
from megdet.run_folder.checkpoint_files import checkpoint_step, checkpoints
from megdet.run_folder.folder import RunFolder
from megdet.studies.comparison.student import mean_interval
from megdet.studies.gradients.findings import ModuleVariance
from megdet.studies.gradients.statistics import Estimate
from megdet.studies.gradients.units import load_study
from megdet.studies.gradients.variance import measure_variance

_FILE, _NOISE = "updates.json", "noise.json"


@dataclass(frozen=True)
class Measured:
    """Eq. 4 at the weights of one checkpoint."""

    step: int
    factor: int
    """k"""
    ratio: float
    """variance of one update of rate k r from k N images over that of k updates of rate r from N each; 1 under Eq. 4"""
    error: float
    """its standard error, from blocks of images"""


def measure_updates(
    folder: RunFolder, factors: Sequence[int], device: torch.device, workers: int, say: Callable[[str], None]
) -> list[Measured]:
    """Measure at every checkpoint of a run; what was measured before is read. Raises InputError as `measure_variance`.

    A run without checkpoints, taken over from another machine, has what it brought with it.
    """
    file = folder.path / _FILE
    found = read_measured(folder)
    steps = [checkpoint_step(path) for path in checkpoints(folder)]
    for step in steps:
        if any(own.step == step for own in found):
            continue
        whole = _whole(folder, factors, device, workers, step)
        found += [Measured(step, own.factor, own.ratio.value, own.ratio.error) for own in whole.updates]
        write_json_atomically(file, [asdict(own) for own in found], indent=2)
        ratios = ", ".join(f"{own.ratio} for k = {own.factor}" for own in whole.updates)
        say(f"{folder.path.name}, step {step}: the large update varies {ratios} times as much as the small ones")
    return found


def read_measured(folder: RunFolder) -> list[Measured]:
    """What was measured of a run. Raises InputError for a damaged file."""
    file = folder.path / _FILE
    return read_json(file, list[Measured]) if file.exists() else []


def keep_measured(folder: RunFolder, measured: Sequence[Measured]) -> None:
    """Write what was measured of a run elsewhere. Raises InputError if that fails."""
    if measured:
        write_json_atomically(folder.path / _FILE, [asdict(own) for own in measured], indent=2)


def measure_noise(folder: RunFolder, device: torch.device, workers: int) -> None:
    """Measure the gradient noise scale at a run's newest weights, once. Raises InputError as `measure_variance`."""
    if (folder.path / _NOISE).exists():
        return
    whole = _whole(folder, (1, 2), device, workers)
    write_json_atomically(folder.path / _NOISE, whole.direct.as_dict(), indent=2)


def read_noise(folder: RunFolder) -> str | None:
    """The noise scale of a run with its error, in images; None if it was not measured."""
    file = folder.path / _NOISE
    if not file.exists():
        return None
    own = read_json(file, dict[str, Any])
    return "not resolved" if own["scale"] is None else str(Estimate(own["scale"]["value"], own["scale"]["error"]))


def judge_variances(statements: Sequence[Keeps], measured: Mapping[str, Sequence[Sequence[Measured]]]) -> list[Verdict]:
    """What the measurements of each row's trainings say of Eq. 4."""
    return [_judge(own, measured.get(own.row, ()), equality_level(len(statements))) for own in statements]


def cells(row: str, factor: int, trainings: Sequence[Sequence[Measured]]) -> list[str]:
    """A line of the table: the mean of the trainings at each checkpoint, and over all."""
    own = [[point for point in points if point.factor == factor] for points in trainings]
    own = [points for points in own if points]
    if not own:
        return [row, str(factor), "not measured", "", ""]
    steps = sorted({point.step for points in own for point in points})
    by_step = {step: [point.ratio for points in own for point in points if point.step == step] for step in steps}
    course = ", ".join(f"{step}: {fmean(values):.2f}" for step, values in by_step.items())
    mean = math.exp(fmean(_log_ratio(points) for points in own))
    return [row, str(factor), str(len(own)), course, f"{mean:.2f}"]


def as_records(trainings: Sequence[Sequence[Measured]]) -> list[list[dict[str, Any]]]:
    """For JSON."""
    return [[asdict(own) for own in points] for points in trainings]


def _whole(
    folder: RunFolder, factors: Sequence[int], device: torch.device, workers: int, step: int | None = None
) -> ModuleVariance:
    """The variance of the whole gradient at a checkpoint, by default the newest."""
    study = load_study(folder, device, step=step)
    variance = measure_variance(study, batch=study.recipe.batch_size, factors=factors, workers=workers)
    return next(module for module in variance.modules if module.name == "whole")


def _judge(own: Keeps, trainings: Sequence[Sequence[Measured]], level: float) -> Verdict:
    points = [[point for point in training if point.factor == own.factor] for training in trainings]
    logs = [_log_ratio(training) for training in points if training]
    interval = mean_interval(logs, level)
    if interval is None:
        return Verdict(own.statement, "not run", f"{own.row} needs two trainings or more that are measured")
    low, high = (math.exp(end) for end in interval)
    evidence = (
        f"{math.exp(fmean(logs)):.2f}, {100 * level:.3g}% interval {low:.2f} to {high:.2f} over {len(logs)} seeds, "
        f"margin {1 / (1 + own.margin):.2f} to {1 + own.margin:.2f}"
    )
    if 1 / (1 + own.margin) < low and high < 1 + own.margin:
        return Verdict(own.statement, "shown", evidence)
    outside = low > 1 + own.margin or high < 1 / (1 + own.margin)
    return Verdict(own.statement, "not shown" if outside else "undecided", evidence)


def _log_ratio(points: Sequence[Measured]) -> float:
    if any(point.ratio <= 0 for point in points):
        raise InputError(f"a variance ratio of {min(point.ratio for point in points):g} is no ratio of variances")
    return fmean(math.log(point.ratio) for point in points)
