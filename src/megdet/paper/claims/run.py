"""`megdet reproduce claim-failing` and the other claims: train the rows' seeds, judge the statements, write the files.

Each training has a run folder `ROW-sSEED` in the folder of its claim. All rows of one seed come before those of the
next, so that a call that was stopped has whole columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megdet.data.demo import draw_demo
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.paper.claims.claim import CLAIMS, Claim
from megdet.paper.claims.earlier import take_over
from megdet.paper.claims.pictures import plot_courses, plot_failures, plot_ratios, plot_scores
from megdet.paper.claims.report import add_measured, claim_report
from megdet.paper.claims.rules import FailMore, Keeps
from megdet.paper.claims.variance import Measured, measure_noise, measure_updates, read_measured, read_noise
from megdet.paper.jobs import run_rows
from megdet.paper.outcome import Outcome
from megdet.paper.pretraining import pretrained_backbone
from megdet.paper.report import Report
from megdet.paper.reproduce import progress_line
from megdet.paper.rows import ClaimItem, data_changes, weights_changes
from megdet.paper.sweep import Train
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_length import decay_of
from megdet.training.loop import train
from megdet.training.run import RunOptions

_TRUNK = "trunk"
"""The run folder of the training from whose weights all rows of a claim start."""


@dataclass(frozen=True)
class ClaimOrder:
    """Which claim to test, where and from which data."""

    item: ClaimItem
    folder: Path
    """of its trainings"""
    data: Path | None = None
    """folder of its images; None = drawn into data/, or data/bccd"""
    weights: Path | None = None
    """file of the backbone's weights; None = a pretraining of ours, for drawn images"""
    rows: str | None = None
    """names of the rows to train, with commas; None = all"""
    seeds: int | None = None
    """trainings of each row; None = as many as the claim asks for"""
    jobs: int = 1
    """trainings side by side, a core each"""
    outcomes: Path | None = None
    """numbers of an earlier call, whose trainings are not made again; None = those in the folder alone"""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """keys on top of every row's: the verdict is then one on another experiment, and says so"""


def reproduce_claim(
    order: ClaimOrder, options: RunOptions, world: World, *, say: Callable[[str], None], train_row: Train = train
) -> Report | None:
    """Train what is missing and write the claim's files into the order's folder; returns the report on rank 0.

    Every rank calls it. The table is written after every training. Raises InputError as `run_sweep`, and for missing
    files.
    """
    claim = CLAIMS[order.item]
    if world.size > 1 and (claim.factors or claim.trunk):
        raise InputError(
            f"{claim.name} measures gradients in one process, not in {world.size}: start it without torchrun"
        )
    seeds = order.seeds or claim.seeds
    chosen_rows = _chosen(claim, order.rows)
    _recipe(claim, chosen_rows[0], 0, order.overrides)  # a wrong key is refused before anything is drawn or trained
    files = _files(claim, order, options, world)
    trunk = _trunk(claim, order, files, options, world, say, train_row)
    if trunk is not None:
        files |= {"start_from": str(trunk.path), "model.backbone.weights": ""}
    recipes = {
        run_name(row, seed): _recipe(claim, row, seed, files | dict(order.overrides))
        for seed in range(seeds)
        for row in claim.rows
    }
    if order.outcomes is not None:
        places = {(row, seed): order.folder / run_name(row, seed) for seed in range(seeds) for row in claim.rows}
        earlier = order.outcomes
        world.on_first(lambda: take_over(earlier, claim.name, partial(_keys, claim, order.overrides), places))
    chosen = [name for name in recipes if name.rpartition("-s")[0] in chosen_rows]

    def report_of(outcomes: Mapping[str, Outcome]) -> Report:
        results, example = results_of(claim, seeds, outcomes), recipes[run_name(chosen_rows[0], 0)]
        report = claim_report(claim, results, example, order.overrides)
        for record in report.records:
            record["keys"] = _keys(claim, order.overrides, record["row"])
            record["seeds"] = [seed for seed in range(seeds) if run_name(record["row"], seed) in outcomes]
        if claim.factors:
            add_measured(report, claim, _measured(runs_of(claim, seeds, outcomes, order.folder)))
        if trunk is not None and (noise := read_noise(trunk)) is not None:
            report.notes.append(f"Noise scale at the weights from which all rows start: {noise} images.")
        return report

    def told(name: str, outcomes: Mapping[str, Outcome]) -> None:
        say(progress_line(name, chosen, outcomes))
        if name in outcomes:
            report_of(outcomes).write(order.folder)

    outcomes = run_rows(
        recipes, order.folder, options, world, chosen=chosen, told=told, jobs=order.jobs, train_row=train_row
    )
    if not world.is_first:
        return None
    if trunk is not None:
        measure_noise(trunk, world.device, options.workers)
    for name in outcomes if claim.factors else ():
        if outcomes[name].status == "trained":
            measure_updates(RunFolder(order.folder / name), claim.factors, world.device, options.workers, say)
            report_of(outcomes).write(order.folder)
    report = report_of(outcomes)
    results, example = results_of(claim, seeds, outcomes), recipes[run_name(chosen_rows[0], 0)]
    report.pictures.extend(_draw(claim, example, order.folder, results, runs_of(claim, seeds, outcomes, order.folder)))
    report.write(order.folder)
    return report


def _trunk(
    claim: Claim,
    order: ClaimOrder,
    files: Mapping[str, Any],
    options: RunOptions,
    world: World,
    say: Callable[[str], None],
    train_row: Train,
) -> RunFolder | None:
    """The training from whose weights all rows start, made if it is missing; None for a claim without."""
    if not claim.trunk:
        return None
    keys = {**claim.keys, **claim.trunk, **files, **order.overrides}
    recipes = {_TRUNK: load_recipe(claim.recipe, keys)}

    def told(name: str, outcomes: Mapping[str, Outcome]) -> None:
        say(progress_line(name, [_TRUNK], outcomes))

    outcomes = run_rows(recipes, order.folder, options, world, told=told, train_row=train_row)
    if outcomes[_TRUNK].status == "failed":
        raise InputError(f"{order.folder / _TRUNK} failed, so no row can start from it: {outcomes[_TRUNK].reason}")
    return RunFolder(order.folder / _TRUNK)


def run_name(row: str, seed: int) -> str:
    """The run folder of a training, in the folder of its claim: `b256-bn16-s0`."""
    return f"{row}-s{seed}"


def results_of(claim: Claim, seeds: int, outcomes: Mapping[str, Outcome]) -> dict[str, list[Outcome]]:
    """The finished trainings of every row, by its name."""
    names = {row: [run_name(row, seed) for seed in range(seeds)] for row in claim.rows}
    return {row: [outcomes[name] for name in own if name in outcomes] for row, own in names.items()}


def runs_of(claim: Claim, seeds: int, outcomes: Mapping[str, Outcome], folder: Path) -> dict[str, list[RunFolder]]:
    """The run folders of those trainings, in the same order."""
    names = {row: [run_name(row, seed) for seed in range(seeds)] for row in claim.rows}
    return {row: [RunFolder(folder / name) for name in own if name in outcomes] for row, own in names.items()}


def _measured(runs: Mapping[str, Sequence[RunFolder]]) -> dict[str, list[list[Measured]]]:
    return {row: [read_measured(run) for run in own] for row, own in runs.items()}


def _keys(claim: Claim, overrides: Mapping[str, Any], row: str) -> dict[str, Any]:
    """All keys of a row but its seed and its files."""
    return {**claim.keys, **claim.rows[row], **overrides}


def _recipe(claim: Claim, row: str, seed: int, changes: Mapping[str, Any]) -> Recipe:
    return load_recipe(claim.recipe, {**claim.keys, **claim.rows[row], **changes, "seed": seed})


def _files(claim: Claim, order: ClaimOrder, options: RunOptions, world: World) -> dict[str, Any]:
    """The keys of the data and the weights; what can be drawn or trained is made first."""
    root = order.data
    if root is None and claim.pictures is not None:
        num_train, num_val = claim.pictures
        drawn = root = Path("data") / f"demo-{num_train}"
        world.on_first(lambda: draw_demo(drawn, num_train=num_train, num_val=num_val))
    keys = data_changes(claim.scale, root) | weights_changes(claim.scale, order.weights)
    if root is not None:
        keys["data.draw_demo"] = ""
    if order.weights is None and claim.scale == "demo":
        keys["model.backbone.weights"] = str(pretrained_backbone(order.folder, None, options, world))
    return keys


def _chosen(claim: Claim, rows: str | None) -> list[str]:
    """The rows with these names. Raises InputError for an unknown name."""
    if rows is None:
        return [*claim.rows]
    wanted = [name.strip() for name in rows.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in claim.rows]
    if unknown or not wanted:
        raise InputError(f"--rows {rows}: no row '{', '.join(unknown)}'; there are {', '.join(claim.rows)}")
    return [row for row in claim.rows if row in wanted]


def _draw(
    claim: Claim,
    example: Recipe,
    folder: Path,
    results: Mapping[str, Sequence[Outcome]],
    runs: Mapping[str, Sequence[RunFolder]],
) -> list[Path]:
    picture = folder / f"{claim.name}.png"
    if not any(results.values()):
        return []
    if isinstance(claim.statements[0], FailMore):
        plot_failures(claim, results, picture)
        return [picture]
    if isinstance(claim.statements[0], Keeps):
        return [picture] if plot_ratios(claim, _measured(runs), picture) else []
    plot_scores(claim, results, picture)
    curves = folder / f"{claim.name}-course.png"
    return [picture, curves] if plot_courses(results, decay_of(example.schedule).milestones, curves) else [picture]
