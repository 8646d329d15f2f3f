"""`megdet reproduce table4`: train the entry's rows, test the last one at several scales, and merge four detectors.

Every row has a run folder for each seed, such as `entry-ohem-s0`, in the folder of the scale. Beside the runs are

    entry-at-scales-s0/    detections and numbers of the detector with all parts, tested at several scales
    entry-ensemble-s0/     detections and numbers of four detectors together, each tested at several scales
    entry-costs.json       seconds and memory of a step of each row, measured alone
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megdet.data.classes import category_ids_for
from megdet.data.coco import validation_set
from megdet.data.result_rows import Detection
from megdet.data.shared import once_a_host
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import Evaluation, evaluate_detections
from megdet.files import make_folder, read_json, typed, write_json_atomically
from megdet.inference.ensemble import Member, member_weights, merged_members
from megdet.inference.predict import Result, detect_dataset
from megdet.inference.trained import load_detector, read_recipe
from megdet.paper.entry import MEMBERS, PARTS, TESTING, entry_recipes, member_names, run_name
from megdet.paper.entry_pictures import draw_figure5, plot_entry
from megdet.paper.entry_report import EntryRow, Score, entry_report
from megdet.paper.jobs import run_rows
from megdet.paper.outcome import Outcome
from megdet.paper.report import Report
from megdet.paper.reproduce import progress_line
from megdet.paper.rows import EntryItem, Scale, data_changes
from megdet.paper.sweep import Train
from megdet.paper.tables import SINGLE_MODEL, TABLE4
from megdet.planning.measuring import Measuring, measure
from megdet.recipe import Recipe
from megdet.run_folder.folder import RunFolder
from megdet.training.datasets import load_datasets
from megdet.training.loop import train
from megdet.training.run import RunOptions

SCALE: Scale = "demo"
AT_SCALES, ENSEMBLE = "at-scales", "ensemble"
"""The rows without a training."""


@dataclass(frozen=True)
class EntryOrder:
    """The item to reproduce, its folder and its data."""

    item: EntryItem
    folder: Path
    """folder of the rows"""
    data: Path | None = None
    """folder of the images; None = data/demo-hard"""
    rows: str | None = None
    """names of the rows to train, with commas; None = all"""
    seeds: int = 3
    """trainings of each row"""
    jobs: int = 1
    """trainings side by side, a core each"""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """keys on top of every row's"""


@dataclass(frozen=True)
class StepCost:
    """The time and memory of a row's step on this machine."""

    seconds: float
    bytes: int | None
    """peak memory; None if the machine does not tell"""


def reproduce_entry(
    order: EntryOrder, options: RunOptions, world: World, *, say: Callable[[str], None], train_row: Train = train
) -> Report | None:
    """Train what is missing, test it, and write table4 into the order's folder; returns the report on rank 0.

    Every rank calls it. The table is written after every row. Raises InputError as `run_sweep` does.
    """
    recipes = entry_recipes(data_changes(SCALE, order.data) | dict(order.overrides), order.seeds)
    chosen = [*recipes] if order.rows is None else _chosen(recipes, order.rows)
    costs = order.folder / "entry-costs.json"

    def told(name: str, outcomes: Mapping[str, Outcome]) -> None:
        say(progress_line(name, chosen, outcomes))
        entry_report(order.item, SCALE, _rows(order, outcomes, costs), []).write(order.folder)

    outcomes = run_rows(
        recipes, order.folder, options, world, chosen=chosen, told=told, jobs=order.jobs, train_row=train_row
    )
    for seed in range(order.seeds):
        if all(name in outcomes and outcomes[name].status == "trained" for name in member_names(seed)):
            _test(order.folder, seed, options, world, say)
    if not world.is_first:
        return None
    _measure(recipes, outcomes, costs, say)
    rows, picture = _rows(order, outcomes, costs), order.folder / f"{order.item}.png"
    shown = order.folder / run_name(AT_SCALES, 0) / "detections.json"
    report = entry_report(order.item, SCALE, rows, [_what(recipes, order)])
    if order.item == "table4":
        plot_entry(rows, picture)
        report.pictures.append(picture)
    elif shown.exists():
        draw_figure5(
            load_datasets(next(iter(recipes.values())), World(0, 1, world.device)).val, read_json(shown), picture
        )
        report.pictures.append(picture)
    else:
        report.notes.append("No picture: the detector with all parts is not trained yet.")
    report.write(order.folder)
    return report


def _chosen(recipes: Mapping[str, Recipe], rows: str) -> list[str]:
    """The trainings of the rows with these names. Raises InputError for an unknown name."""
    wanted = [name.strip() for name in rows.split(",") if name.strip()]
    known = [*(part.name for part in PARTS), *MEMBERS]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise InputError(f"--rows {rows}: no row '{', '.join(unknown)}'; there are {', '.join(known)}")
    return [name for name in recipes if any(name.startswith(f"entry-{row}-s") for row in wanted)]


def _test(folder: Path, seed: int, options: RunOptions, world: World, say: Callable[[str], None]) -> None:
    """Test the members of a seed at several scales and merge their detections, unless that is done."""
    joined = folder / run_name(ENSEMBLE, seed)
    if world.on_first((joined / "evaluation.json").exists):
        return
    world.on_first(lambda: say(f"testing the four detectors of seed {seed} at several scales"))
    found: list[list[Result]] = []
    for name in member_names(seed):
        found.append(_detect(folder / name, options, world))
        if len(found) == 1:
            world.on_first(lambda: _keep(folder / run_name(AT_SCALES, seed), folder / member_names(seed)[0], found[0]))
    world.on_first(lambda: _keep(joined, folder / member_names(seed)[0], _together(found)))


def _detect(run: Path, options: RunOptions, world: World) -> list[Result]:
    trained = load_detector(RunFolder(run), world.device, dict(TESTING), world=world)
    data, has_masks = trained.recipe.data, trained.model.has_masks
    dataset = once_a_host(world, lambda: validation_set(data, with_masks=has_masks))
    ids = category_ids_for(trained.class_names, dataset)
    return detect_dataset(trained.model, trained.recipe, dataset, ids, world, workers=options.workers)


def _together(found: list[list[Result]]) -> list[Result]:
    """The four detectors' detections merged by weighted boxes fusion."""
    members = [
        Member(Path(name), typed(results, list[Detection], name))
        for name, results in zip(member_names(0), found, strict=True)
    ]
    class_ids = sorted({result["category_id"] for results in found for result in results})
    return merged_members(members, class_ids, member_weights(len(members), class_ids, None), "wbf")


def _keep(folder: Path, run: Path, results: list[Result]) -> None:
    """Write detections on the validation images of a run, and their numbers."""
    data = read_recipe(RunFolder(run)).data
    numbers = evaluate_detections(Path(data.val_annotations), results)
    make_folder(folder)
    write_json_atomically(folder / "detections.json", results)
    write_json_atomically(folder / "evaluation.json", numbers.as_dict(), indent=2)


def _read_scores(order: EntryOrder) -> dict[str, Score]:
    """The scores of the rows without a training, by folder name, as far as they are done."""
    found = {}
    for name in (run_name(row, seed) for row in (AT_SCALES, ENSEMBLE) for seed in range(order.seeds)):
        file = order.folder / name / "evaluation.json"
        if file.exists():
            box = Evaluation.from_dict(read_json(file), str(file)).bbox
            found[name] = Score(100 * box.AP, 100 * box.AP50, 100 * box.AR100)
    return found


def _measure(
    recipes: Mapping[str, Recipe], outcomes: Mapping[str, Outcome], file: Path, say: Callable[[str], None]
) -> None:
    """Measure a step of every row that has a training but no cost yet."""
    costs = _read_costs(file)
    for row in (*(part.name for part in PARTS), *MEMBERS):
        name = run_name(row, 0)
        if name in outcomes and row not in costs:
            say(f"measuring a step of {row}")
            costs[row] = step_cost(recipes[name])
            write_json_atomically(file, {name: asdict(cost) for name, cost in costs.items()}, indent=2)


def step_cost(recipe: Recipe) -> StepCost:
    """Seconds and memory of a step of the whole mini-batch, measured in a process of its own."""
    step = measure(recipe, Measuring(sizes=(recipe.batch_size,), plans=(recipe.recompute,))).points[0]
    return StepCost(step.seconds, step.bytes)


def _read_costs(file: Path) -> dict[str, StepCost]:
    return read_json(file, dict[str, StepCost]) if file.exists() else {}


def _what(recipes: Mapping[str, Recipe], order: EntryOrder) -> str:
    """A sentence that describes the rows."""
    recipe = next(iter(recipes.values()))
    return (
        f"Scale {SCALE}: {recipe.batch_size} images a step, BN size {recipe.bn_size}, "
        f"{recipe.model.backbone.name} from random weights, short edge {recipe.data.short_edges[-1]} px, "
        f"{recipe.schedule.epochs:g} epochs of the harder drawn shapes, {order.seeds} seeds."
    )


def _rows(order: EntryOrder, outcomes: Mapping[str, Outcome], costs_file: Path) -> list[EntryRow]:
    """The rows of the table, as far as they are done."""
    tested, costs, rows = _read_scores(order), _read_costs(costs_file), []
    for name, adds in _texts().items():
        row = EntryRow(name, adds)
        for seed in range(order.seeds):
            _fill(row, run_name(name, seed), outcomes, tested)
        if name in costs:
            row.step_seconds, row.step_bytes = costs[name].seconds, costs[name].bytes
        rows.append(row)
    by_name = {row.name: row for row in rows}
    by_name[AT_SCALES].paper, by_name[ENSEMBLE].paper = SINGLE_MODEL, TABLE4[-1]
    return rows


def _texts() -> dict[str, str]:
    """What each row adds, in the order of the table."""
    rest = ", ".join(MEMBERS)
    return {
        **{part.name: part.appendix for part in PARTS},
        AT_SCALES: "multi-scale testing, with flips",
        **{name: f"{PARTS[-1].name}, but {_changed(changes)}" for name, changes in MEMBERS.items()},
        ENSEMBLE: f"{PARTS[-1].name}, {rest}: four detectors, each tested at several scales",
    }


def _changed(changes: Mapping[str, object]) -> str:
    return ", ".join(f"{key.removeprefix('model.')} {value}" for key, value in changes.items())


def _fill(row: EntryRow, name: str, outcomes: Mapping[str, Outcome], tested: Mapping[str, Score]) -> None:
    if name in tested:
        row.scores.append(tested[name])
    outcome = outcomes.get(name)
    if outcome is None:
        return
    row.minutes.append(60 * outcome.hours)
    if outcome.mmap is None or outcome.ap50 is None or outcome.mmar is None:
        row.failures.append(outcome.reason or "its data have no box to find")
    else:
        row.scores.append(Score(outcome.mmap, outcome.ap50, outcome.mmar))
