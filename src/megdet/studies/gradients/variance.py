"""Variance equivalence, measured (Sec. 3.2, Eq. 2-4): mini-batches of N and of kN, k small updates and one large one.

Eq. 2 and 3 say that the variance of the gradient of a mini-batch falls as 1/N if images are drawn independently. Eq. 4
says that one update of rate kr from kN images then varies as much as k updates of rate r from N images each. Both are
measured at the weights of a run's checkpoint, with disjoint mini-batches from the run's own plan. The k small
updates really move the weights, which the equation neglects.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megdet.errors import InputError
from megdet.structures import Batch
from megdet.studies.gradients.findings import Level, ModuleVariance, Update, Variance
from megdet.studies.gradients.statistics import (
    Numbers,
    batch_variance,
    jackknife,
    noise_of_two_batches,
    noise_of_units,
    total_variance,
)
from megdet.studies.gradients.units import (
    Sketch,
    Study,
    add_gradient,
    gradients_of,
    units_of_plan,
)
from megdet.training.schedule import learning_rate, scaled_rate

FACTORS = (1, 2, 4, 8)
FEWEST_BATCHES = 4
"""The fewest of the largest mini-batches from which errors are estimated."""
BATCHES = 8
"""How many of the largest mini-batches are taken, if the data set has them."""

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, the amount done, and the whole amount."""


def measure_variance(
    study: Study,
    *,
    batch: int | None = None,
    factors: Sequence[int] = FACTORS,
    images: int | None = None,
    rate: float | None = None,
    workers: int = 0,
    progress: Progress = lambda _what, _done, _of: None,
) -> Variance:
    """Measure mini-batches of `batch` images (default: the recipe's) times 1 and times each of the factors.

    `images` is the most images to use. `rate` is r; its default is the rate of `batch` images after warmup, by the
    recipe's scaling rule, and exists for SGD only. Momentum, clipping and weight decay are left out. Raises
    InputError for too few images, for a missing rate and for a gradient that is not finite.
    """
    batch = batch or study.recipe.batch_size
    factors = sorted({1, *factors})
    if factors[0] < 1 or len(factors) < 2:
        raise InputError("--factors: name at least one above 1, such as 1,2,4,8")
    if batch % study.unit_images:
        raise InputError(f"--batch {batch}: it must be a multiple of bn_size {study.unit_images}, a group is not cut")
    if rate is None:
        _check_optimizer(study)
        rate = scaled_rate(replace(study.recipe, batch_size=batch))
    if not (math.isfinite(rate) and rate > 0):
        raise InputError(f"--rate {rate}: it must be above 0")
    block = batch * factors[-1]
    blocks = _num_blocks(study, batch, factors[-1], images)
    per_block, per_batch = block // study.unit_images, batch // study.unit_images
    sketch = Sketch(study.trained)
    rows = _unit_rows(study, sketch, blocks * per_block, workers, progress)
    paths = _small_updates(study, sketch, blocks, per_batch, factors, rate, workers, progress)
    modules = []
    for name in (*rows, "whole"):
        own = list(rows) if name == "whole" else [name]
        unit_rows = np.concatenate([rows[part] for part in own], axis=1)
        moved = {k: np.concatenate([paths[k][part] for part in own], axis=1) for k in factors[1:]}
        gram = unit_rows @ unit_rows.T
        levels = _levels(gram, per_batch, factors, batch, blocks)
        updates = [
            _update(k, moved[k], unit_rows, per_batch, per_block, rate, levels[0].variance.value) for k in factors[1:]
        ]
        modules.append(
            ModuleVariance(
                name,
                study.model.parts.get(name, name),
                sum(parameter.numel() for part in own for parameter in study.trained[part]),
                tuple(levels),
                tuple(updates),
                noise_of_two_batches(gram, per_batch, per_block, study.unit_images),
                noise_of_units(gram, per_block, study.unit_images),
            )
        )
    unit = "group" if study.has_groups else "image"
    return Variance(
        str(study.folder.path),
        study.step,
        unit,
        study.unit_images,
        blocks * block,
        blocks,
        rate,
        study.recipe.optimizer.kind,
        learning_rate(study.recipe, len(study.dataset), max(0, study.step - 1)),
        study.overrides,
        tuple(modules),
    )


def _check_optimizer(study: Study) -> None:
    """Raise InputError if the run's optimizer is not SGD: its rate does not suit the updates, which are plain SGD."""
    kind = study.recipe.optimizer.kind
    if kind != "sgd":
        raise InputError(
            f"{study.folder.recipe}: optimizer.kind is {kind}, but the updates of Eq. 4 are made by plain SGD, which "
            "needs another rate: choose one with --rate"
        )


def _num_blocks(study: Study, batch: int, largest: int, images: int | None) -> int:
    """How many of the largest mini-batches are measured. Raises InputError if there are too few."""
    there, block = study.disjoint_images, batch * largest
    wanted = block * BATCHES if images is None else images
    blocks = min(wanted, there) // block
    if blocks < FEWEST_BATCHES:
        fitting = min(wanted, there) // (FEWEST_BATCHES * largest) // study.unit_images * study.unit_images
        why = (
            f"--images {images}" if images is not None and images <= there else f"{study.recipe.data.train_annotations}"
        )
        mend = f"--batch {fitting} or smaller --factors" if fitting else "smaller --factors"
        raise InputError(
            f"{why}: {min(wanted, there)} different images are too few for an estimate: {FEWEST_BATCHES} disjoint "
            f"mini-batches of {largest} x {batch} images take {FEWEST_BATCHES * block}; choose {mend}, or more images"
        )
    return blocks


def _unit_rows(study: Study, sketch: Sketch, num_units: int, workers: int, progress: Progress) -> dict[str, Numbers]:
    """The sketch of every unit's gradient, by module."""
    rows = _tables(sketch, num_units)
    for number, unit in enumerate(units_of_plan(study, num_units, workers)):
        study.model.zero_grad(set_to_none=True)
        add_gradient(study, unit, study.unit_images)
        for name, parameters in study.trained.items():
            row = sketch.of(name, gradients_of(parameters))
            _check_finite(row, f"gradient of {name}", study, unit)
            rows[name][number] = row.numpy()
        progress("gradients", number + 1, num_units)
    return rows


def _tables(sketch: Sketch, num_rows: int) -> dict[str, Numbers]:
    """Room for the sketches of each module: made at once, since many small blocks among those of steps split memory."""
    return {name: np.empty((num_rows, columns)) for name, columns in sketch.columns.items()}


def _small_updates(
    study: Study,
    sketch: Sketch,
    blocks: int,
    per_batch: int,
    factors: Sequence[int],
    rate: float,
    workers: int,
    progress: Progress,
) -> dict[int, dict[str, Numbers]]:
    """How far the first k small updates of each block move the weights, by k and module."""
    moved = {k: _tables(sketch, blocks) for k in factors[1:]}
    before = {name: [p.detach().clone() for p in own] for name, own in study.trained.items()}
    last = factors[-1]
    units = units_of_plan(study, blocks * last * per_batch, workers)
    for block in range(blocks):
        for k in range(1, last + 1):
            unit = _small_update(study, units, per_batch, rate)
            if k in moved:
                for name, parameters in study.trained.items():
                    row = sketch.of(name, [p.detach() - old for p, old in zip(parameters, before[name], strict=True)])
                    _check_finite(row, f"{k} updates of rate {rate:.4g}: {name}", study, unit)
                    moved[k][name][block] = row.numpy()
            progress("updates", block * last + k, blocks * last)
        with torch.no_grad():
            for name, parameters in study.trained.items():
                torch._foreach_copy_(list[Tensor](parameters), before[name])
    return moved


def _small_update(study: Study, units: Iterator[Batch], per_batch: int, rate: float) -> Batch:
    """One step of plain SGD; returns its last unit."""
    study.model.zero_grad(set_to_none=True)
    for _ in range(per_batch):
        unit = next(units)
        add_gradient(study, unit, per_batch * study.unit_images)
    with torch.no_grad():
        for parameters in study.trained.values():
            torch._foreach_add_(list[Tensor](parameters), gradients_of(parameters), alpha=-rate)
    return unit


def _check_finite(row: Tensor, what: str, study: Study, unit: Batch) -> None:
    if not bool(row.isfinite().all()):
        names = ", ".join(study.dataset.file_names[index] for index in unit.image_index[:4])
        raise InputError(
            f"{study.folder.path}: {what} is not finite at step {study.step} (images {names}): the run has diverged or "
            "the rate is too high; take a healthy checkpoint or a lower --rate"
        )


def _levels(gram: Numbers, per_batch: int, factors: Sequence[int], batch: int, blocks: int) -> list[Level]:
    def statistic(part: Numbers) -> Numbers:
        variances = np.array([batch_variance(part, k * per_batch) for k in factors])
        return np.concatenate([variances, variances * factors / variances[0]])

    if batch_variance(gram, per_batch) <= 0:
        raise InputError(f"{batch} images always give the same gradient: it has no variance to measure")
    found = jackknife(gram, factors[-1] * per_batch, statistic)
    number = len(factors)
    return [Level(k, k * batch, blocks * factors[-1] // k, found[i], found[number + i]) for i, k in enumerate(factors)]


def _update(
    factor: int, small: Numbers, units: Numbers, per_batch: int, per_block: int, rate: float, variance: float
) -> Update:
    """Compare displacements (blocks, columns) by small updates with those of one large update from the same images."""
    first = units.reshape(len(small), per_block, -1)[:, : factor * per_batch]
    large = -factor * rate * first.mean(axis=1)

    def variances(gram: Numbers) -> Numbers:
        small_variance = total_variance(gram[0::2, 0::2])
        large_variance = total_variance(gram[1::2, 1::2])
        return np.array([small_variance, large_variance, large_variance / small_variance])

    both = np.stack([small, large], axis=1).reshape(2 * len(small), -1)
    of_small, of_large, ratio = jackknife(both @ both.T, 2, variances)
    apart, length = (np.square(rows).sum(axis=1) for rows in (small - large, large))
    distance = math.sqrt(float((apart / length).mean()))
    return Update(factor, len(small), of_small, of_large, ratio, factor * rate**2 * variance, distance)
