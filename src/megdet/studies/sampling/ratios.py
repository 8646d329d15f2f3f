"""Table 1: the fraction of sampled RoIs and anchors that is positive, by epoch and mini-batch size, for any runs.

The paper does not say whether its ratio is of positives to negatives or to all. Here it is the fraction of the sampled
candidates that is positive: a mean over images, then over the steps of the epoch. For RoIs it cannot exceed the
sampler's positive_fraction, 25% in the baseline; no number of Table 1 does.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megdet.errors import InputError
from megdet.inference.trained import read_recipe
from megdet.model.choice import detector_class
from megdet.recipe import Recipe
from megdet.recipe_check import flat_keys
from megdet.run_folder.checkpoint_files import latest_checkpoint, open_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.studies.sampling.table1 import TABLE1

_SIZES = (
    *("data.short_edges", "data.max_long_edge", "data.scale_jitter", "data.scale_law"),
    *("data.crop", "data.crop_least_area", "model.kind"),
)
"""Keys that change the meaning of a ratio, besides the detector's `sampling_keys`: runs must agree in all."""


@dataclass(frozen=True)
class Ratio:
    """One row of the table: an epoch of a run."""

    run: str
    epoch: int
    batch_size: int
    bn_size: int
    steps: int
    """steps of the epoch in the metrics"""
    epoch_steps: int
    """all steps of the epoch"""
    ratios: dict[str, float]
    """kind of sample -> fraction that is positive; the first is that of Table 1"""
    paper: float | None
    """Table 1's number for RoIs, if the table has this epoch and mini-batch size"""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, where the ratios are called roi_ratio and so on."""
        own = asdict(self)
        ratios = {f"{sample.lower()}_ratio": ratio for sample, ratio in own.pop("ratios").items()}
        return own | ratios


def sampling_table(folders: Sequence[RunFolder], epochs: Sequence[int] | None = None) -> list[Ratio]:
    """The rows of Table 1 for some runs: by epoch, then in the order of the runs.

    `epochs` count from 1; the default are those of the paper (1, 6 and 12) if all runs have them, else the first, the
    middle and the last that all runs have finished. Raises InputError for a folder without metrics or without a
    finished epoch, for an epoch that a run does not have or whose lines are lost, and for runs that do not compare.
    """
    recipes = [read_recipe(folder) for folder in folders]
    check_comparable(folders, recipes)
    counts = detector_class(recipes[0].model).counts
    if not counts:
        raise InputError(f"{folders[0].recipe}: model.kind {recipes[0].model.kind} samples nothing; name another run")
    lines = [_steps(folder, counts[-1].name) for folder in folders]
    finished = [int(own[-1]["epoch"] + 1e-6) for own in lines]
    for folder, own in zip(folders, finished, strict=True):
        if own < 1:
            raise InputError(f"{folder.metrics}: no epoch is finished yet; train on")
    if epochs is None:
        last = min(finished)
        of_paper = sorted({epoch for epoch, _ in TABLE1})
        epochs = of_paper if last >= of_paper[-1] else sorted({1, (last + 1) // 2, last})
    for epoch in epochs:
        for folder, own in zip(folders, finished, strict=True):
            if not 1 <= epoch <= own:
                raise InputError(f"--epochs {epoch}: {folder.path} has finished epochs 1 to {own}")
    return [
        _ratio(folder, recipe, own, epoch)
        for epoch in epochs
        for folder, recipe, own in zip(folders, recipes, lines, strict=True)
    ]


def check_comparable(folders: Sequence[RunFolder], recipes: Sequence[Recipe]) -> None:
    """Refuse runs whose ratios have different meanings: other data, or other keys of the sampling."""
    first, others = folders[0], folders[1:]
    if not others:
        return
    data = _data_of(first)
    for folder, recipe in zip(others, recipes[1:], strict=True):
        theirs = _data_of(folder)
        if theirs != data:
            raise InputError(
                f"{first.path} and {folder.path} do not compare: they were trained on other data ({data[0]} images of "
                f"{data[1]} classes, {theirs[0]} of {theirs[1]}"
                + ("" if theirs[:2] != data[:2] else ", which are not the same")
                + "); name runs of the same data"
            )
        keys = flat_keys(asdict(recipes[0])), flat_keys(asdict(recipe))
        sampling = [f"model.{key}" for key in detector_class(recipes[0].model).sampling_keys]
        for key in (*_SIZES, *sampling):
            a, b = (own.get(key) for own in keys)
            if a != b:
                raise InputError(
                    f"{first.path} and {folder.path} do not compare: {key} is {a} there and {b} here; name runs that "
                    "sample alike"
                )


def _data_of(folder: RunFolder) -> tuple[int, int, str]:
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise InputError(f"{folder.path}: the run has no checkpoint yet, so its data are not known; train on")
    state = open_checkpoint(checkpoint).state
    return state.num_images, len(state.class_names), state.data


def _steps(folder: RunFolder, count: str) -> list[dict[str, Any]]:
    if not Path(folder.metrics).is_file():
        raise InputError(f"{folder.path}: the run has no metrics.jsonl, which `megdet train` writes; name another run")
    lines = [line for line in read_metrics(folder.metrics) if count in line and "epoch" in line]
    if not lines:
        raise InputError(f"{folder.metrics}: no line of a step; train on")
    return lines


def _ratio(folder: RunFolder, recipe: Recipe, lines: list[dict[str, Any]], epoch: int) -> Ratio:
    own = [line for line in lines if _epoch_of(line) == epoch]
    if not own:
        raise InputError(f"{folder.metrics}: the lines of epoch {epoch} are missing; choose other --epochs")
    ratios = {
        counted.sample: counted.ratio(sum(line[counted.name] for line in own) / len(own), recipe.model)
        for counted in reversed(detector_class(recipe.model).counts)
    }
    paper = TABLE1.get((epoch, recipe.batch_size)) if "RoI" in ratios else None
    return Ratio(
        str(folder.path),
        epoch,
        recipe.batch_size,
        recipe.bn_size,
        len(own),
        _steps_of_epoch(lines[-1], recipe.batch_size, epoch),
        ratios,
        None if paper is None else round(paper / 100, 4),
    )


def _epoch_of(line: dict[str, Any]) -> int:
    """The epoch, from 1, in which a step began; it may end in the next one."""
    began = line["epoch"] * (line["step"] - 1) / line["step"]
    return int(began + 1e-6) + 1


def _steps_of_epoch(line: dict[str, Any], batch_size: int, epoch: int) -> int:
    """The number of steps that begin in an epoch; `line` is any line of the metrics, for the number of images."""
    num_images: int = round(line["step"] * batch_size / line["epoch"])
    first, after = (math.ceil(done * num_images / batch_size) for done in (epoch - 1, epoch))
    return after - first
