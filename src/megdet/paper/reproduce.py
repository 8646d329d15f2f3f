"""Tables 1 to 3 and their figures: train the rows, then write table and picture beside the paper's numbers.

The folder of a scale holds one run folder a row, shared by all tables and figures that need the row:

    b16-bn0/ ... b256-bn16-long/   runs, with outcome.json if they are finished
    b16-bn0-s1/ ...                runs of the second seed
    pretraining/                   scale demo without weights: the run that trains the rows' backbone
    table3.md, table3.json, table3.png, ...
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.paper.figures import find_curve, plot_curves, plot_sweep
from megdet.paper.jobs import run_rows
from megdet.paper.outcome import Outcome
from megdet.paper.pretraining import pretrained_backbone
from megdet.paper.report import Report, outcomes_of_row, row_label, scale_note, training_report
from megdet.paper.rows import (
    Scale,
    SweptItem,
    chosen_rows,
    data_changes,
    refuse_fixed_keys,
    row_name,
    row_recipe,
    rows_of,
    seed_name,
    weights_changes,
)
from megdet.paper.sampling import proposals_report, ratios_report
from megdet.paper.sweep import Train
from megdet.paper.tables import FIGURES, TrainingRow, recipe_of
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe
from megdet.run_folder.checkpoint_files import latest_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.training.loop import train
from megdet.training.run import RunOptions


@dataclass(frozen=True)
class Order:
    """The item to reproduce, its folder and its data."""

    item: SweptItem
    scale: Scale
    folder: Path
    """folder of the scale's rows"""
    data: Path | None = None
    """folder of the scale's images; None = data/SCALE"""
    weights: Path | None = None
    """file of the backbone's weights"""
    rows: str | None = None
    """names of the rows to train, with commas, of tables 2 and 3; None = all"""
    seeds: int = 1
    """trainings of each row"""
    jobs: int = 1
    """trainings side by side, a core each"""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """keys on top of every row's"""


@dataclass(frozen=True)
class _Standing:
    """The state of an order."""

    order: Order
    rows: Sequence[TrainingRow]
    """the rows that the item needs"""
    recipes: Mapping[str, Recipe]
    """the recipes of the rows, by name"""
    outcomes: Mapping[str, Outcome]
    """the outcomes of the finished rows, by name"""


def reproduce(
    order: Order,
    options: RunOptions,
    world: World,
    *,
    say: Callable[[str], None],
    train_row: Train = train,
) -> Report | None:
    """Train what is missing and write the item's files into the order's folder; returns the report on rank 0.

    Every rank calls it. The table is written after every row. Raises InputError as `run_sweep` does, and for missing
    files.
    """
    rows = rows_of(order.item)
    if order.rows is not None and order.item not in ("table2", "table3"):
        raise InputError(f"--rows is for table2 and table3: {order.item} needs all of its rows")
    if order.seeds > 1 and order.item in ("table1", "figure2"):
        raise InputError(f"{order.item} shows one training of each of its rows: leave out --seeds")
    chosen = [seed_name(row, seed) for seed in range(order.seeds) for row in chosen_rows(rows, order.rows)]
    load_recipe(recipe_of(rows[0]) if order.scale == "coco" else f"reproduce-{order.scale}", order.overrides)
    refuse_fixed_keys(order.scale, order.overrides)
    changes = data_changes(order.scale, order.data) | weights_changes(order.scale, order.weights)
    if order.scale == "demo" and order.weights is None:
        changes["model.backbone.weights"] = str(pretrained_backbone(order.folder, order.data, options, world))
    changes |= order.overrides
    firsts = {row: row_recipe(row, order.scale, changes) for row in rows}
    recipes = {
        seed_name(row, seed): replace(recipe, seed=recipe.seed + seed)
        for seed in range(order.seeds)
        for row, recipe in firsts.items()
    }

    def told(name: str, outcomes: Mapping[str, Outcome]) -> None:
        say(progress_line(name, chosen, outcomes))
        _training_report(_Standing(order, rows, recipes, outcomes)).write(order.folder)

    outcomes = run_rows(
        recipes, order.folder, options, world, chosen=chosen, told=told, jobs=order.jobs, train_row=train_row
    )
    if not world.is_first:
        return None
    report = _report(_Standing(order, rows, recipes, outcomes), world, options.workers)
    report.write(order.folder)
    return report


def progress_line(name: str, chosen: Sequence[str], outcomes: Mapping[str, Outcome]) -> str:
    """A line on a training that begins or has ended: its number among all, and its result."""
    place = f"row {chosen.index(name) + 1} of {len(chosen)}, {name}"
    if name not in outcomes:
        return f"{place}: training"
    own = outcomes[name]
    number = "" if own.mmap is None else f" mmAP {own.mmap:.1f}"
    return f"{place}: {own.status}{number} after {own.steps} steps in {60 * own.hours:.1f} min {own.reason}".rstrip()


def _training_report(own: _Standing, pictures: Sequence[Path] = ()) -> Report:
    order = own.order
    report = training_report(order.item, order.scale, own.rows, own.outcomes, list(pictures), order.seeds)
    first = next((own.recipes[row_name(row)] for row in own.rows if row.rate == "normal"), None)
    if first is not None:
        report.notes.insert(0, scale_note(order.scale, first))
    return report


def _report(own: _Standing, world: World, workers: int) -> Report:
    order, first = own.order, own.rows[0]
    picture = order.folder / f"{order.item}.png"
    if order.item in ("table2", "table3"):
        found = [[*outcomes_of_row(row, order.seeds, own.outcomes).values()] for row in own.rows]
        plot_sweep(own.rows, found, picture, f"here: scale {order.scale}")
        return _training_report(own, [picture])
    if order.item in ("figure1", "figure4"):
        return _curves_report(own, picture)
    if order.item == "table1":
        report = ratios_report(order.scale, own.rows, order.folder, own.outcomes)
    elif latest_checkpoint(RunFolder(order.folder / row_name(first))) is None:
        report = _training_report(own)
        report.notes.append(_missing(row_name(first), own.outcomes, "weights to find proposals with"))
        return report
    else:
        report = proposals_report(order.scale, first, order.folder, world, workers)
    report.notes.append(scale_note(order.scale, own.recipes[row_name(first)]))
    return report


def _curves_report(own: _Standing, picture: Path) -> Report:
    """Figures 1 and 4: the existing curves, and notes about rows without a curve."""
    trainings = {seed_name(row, seed): row_label(row) for row in own.rows for seed in range(own.order.seeds)}
    found = {
        name: find_curve(RunFolder(own.order.folder / name), label) if name in own.outcomes else None
        for name, label in trainings.items()
    }
    curves = [curve for curve in found.values() if curve is not None]
    if curves:
        plot_curves(curves, picture)
    report = _training_report(own, [picture] if curves else [])
    report.notes.extend(_missing(name, own.outcomes, "curve") for name, curve in found.items() if curve is None)
    report.notes.extend(_statements(own.order.item))
    return report


def _missing(name: str, outcomes: Mapping[str, Outcome], what: str) -> str:
    """Why a training is not in a picture."""
    outcome = outcomes.get(name)
    if outcome is None:
        return f"{name} is not finished: another process trains it, so there is no {what} yet."
    at = outcome.reason.partition(":")[0]  # "step 24: gradient_norm is not finite"
    how = f"failed at {at}" if outcome.status == "failed" else "found nothing to evaluate"
    return f"{name} {how}: no {what}."


def _statements(item: SweptItem) -> list[str]:
    found: list[Any] = [own for own in FIGURES if own.figure == item]
    return [f"The paper of {own.batch_size} images: {own.statement}." for own in found]
