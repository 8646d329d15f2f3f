"""Table 1: how many of the sampled RoIs and anchors are positive, by epoch and mini-batch size, of any runs.

The paper does not say whether its ratio is of positives to negatives or to all. Here it is the part of the sampled
candidates that is positive: a mean over images, then over the steps of the epoch. For RoIs it cannot exceed
`box_head.positive_fraction`, 25% in the baseline, as all numbers of Table 1 do not.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megdet.errors import InputError
from megdet.inference.trained import read_recipe
from megdet.journal.checkpoint_files import latest_checkpoint, open_checkpoint
from megdet.journal.metrics import read_metrics
from megdet.journal.run_folder import RunFolder
from megdet.recipe import Recipe

PAPER_EPOCHS = (1, 6, 12)
PAPER = {
    (1, 16): 0.0558,
    (1, 256): 0.0982,
    (6, 16): 0.1177,
    (6, 256): 0.1611,
    (12, 16): 0.1659,
    (12, 256): 0.1691,
}
"""Table 1: the ratio by (epoch, mini-batch size), of 1."""

_DECISIVE = (
    *("data.short_edges", "data.max_long_edge", "data.scale_jitter"),
    *("anchors.sizes", "anchors.ratios", "anchors.stride_from_grid"),
    *("rpn.samples", "rpn.positive_fraction", "rpn.positive_iou", "rpn.negative_iou"),
    *("rpn.train_proposals_before_nms", "rpn.train_proposals", "rpn.nms_iou", "rpn.min_size"),
    *("box_head.samples", "box_head.positive_fraction", "box_head.positive_iou"),
)
"""Keys that say what a ratio is of: how large the boxes are, what they meet and what is drawn of it.

Runs that differ in one do not compare.
"""


@dataclass(frozen=True)
class Ratio:
    """One row of the table: an epoch of a run."""

    run: str
    epoch: int
    batch_size: int
    bn_size: int
    steps: int
    """steps of the epoch that were found"""
    epoch_steps: int
    """steps that the epoch has"""
    roi_ratio: float
    """part of the box head's sampled RoIs that is positive, of 1"""
    anchor_ratio: float
    """positive anchors over rpn.samples, of 1"""
    paper: float | None
    """Table 1's number for RoIs, where it has this epoch and mini-batch size"""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def sampling_table(folders: Sequence[RunFolder], epochs: Sequence[int] | None = None) -> list[Ratio]:
    """The rows of Table 1 for some runs: by epoch, then in the order of the runs.

    `epochs` count from 1; without them they are those of the paper (1, 6 and 12) where all runs have them, else the
    first, the middle and the last that all runs have finished. Raises InputError for a folder without metrics or
    without a finished epoch, for an epoch that a run has not or whose lines are lost, and for runs that do not compare.
    """
    recipes = [read_recipe(folder) for folder in folders]
    check_comparable(folders, recipes)
    lines = [_steps(folder) for folder in folders]
    finished = [int(own[-1]["epoch"] + 1e-6) for own in lines]
    for folder, own in zip(folders, finished, strict=True):
        if own < 1:
            raise InputError(f"{folder.metrics}: no epoch is finished yet; train on")
    if epochs is None:
        last = min(finished)
        epochs = PAPER_EPOCHS if last >= PAPER_EPOCHS[-1] else sorted({1, (last + 1) // 2, last})
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
    """Refuse runs whose ratios are of other things: other data, or other keys of `_DECISIVE`."""
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
        for key in _DECISIVE:
            section, name = key.split(".")
            a, b = (getattr(getattr(own, section), name) for own in (recipes[0], recipe))
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


def _steps(folder: RunFolder) -> list[dict[str, Any]]:
    if not Path(folder.metrics).is_file():
        raise InputError(f"{folder.path}: the run has no metrics.jsonl, which `megdet train` writes; name another run")
    lines = [line for line in read_metrics(folder.metrics) if "box_head_positive" in line and "epoch" in line]
    if not lines:
        raise InputError(f"{folder.metrics}: no line of a step; train on")
    return lines


def _ratio(folder: RunFolder, recipe: Recipe, lines: list[dict[str, Any]], epoch: int) -> Ratio:
    own = [line for line in lines if _epoch_of(line) == epoch]
    if not own:
        raise InputError(f"{folder.metrics}: the lines of epoch {epoch} are missing; choose other --epochs")
    return Ratio(
        str(folder.path),
        epoch,
        recipe.batch_size,
        recipe.bn_size,
        len(own),
        _steps_of_epoch(lines[-1], recipe.batch_size, epoch),
        sum(line["box_head_positive"] for line in own) / len(own),
        sum(line["rpn_positive"] for line in own) / len(own) / recipe.rpn.samples,
        PAPER.get((epoch, recipe.batch_size)),
    )


def _epoch_of(line: dict[str, Any]) -> int:
    """The epoch, from 1, in which a step began; it ends within the next one where epochs are no whole steps."""
    began = line["epoch"] * (line["step"] - 1) / line["step"]
    return int(began + 1e-6) + 1


def _steps_of_epoch(line: dict[str, Any], batch_size: int, epoch: int) -> int:
    """How many steps begin in an epoch, by what any line says of the number of images."""
    num_images: int = round(line["step"] * batch_size / line["epoch"])
    first, after = (math.ceil(done * num_images / batch_size) for done in (epoch - 1, epoch))
    return after - first
