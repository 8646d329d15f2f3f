"""The verb simulate: predicts times on clusters."""

from dataclasses import replace
from typing import Any

from rich.table import Table

from megdet.cli.options import CONSOLE, Arguments
from megdet.errors import InputError
from megdet.paper.times import (
    GOOD,
    OTHERS,
    Constants,
    Prediction,
    count_good,
    plain_rule,
    predict_by_rule,
    predict_paper,
)
from megdet.planning.published import USABLE, Machine, machine_of
from megdet.planning.scaling import Asked, Point, last_that_pays, simulate_scaling

_SCALING = ("device", "images_per_device", "bn_size", "batch_size", "noise_scale", "fraction", "overhead")


def run_simulate(arguments: Arguments) -> None:
    """Print the paper's rows and their predictions, or the scaling of current devices."""
    given = {name: getattr(arguments, name) for name in _SCALING if getattr(arguments, name) is not None}
    if arguments.paper and given:
        name = next(iter(given)).replace("_", "-")
        raise InputError(f"--{name} has no effect with --paper: leave one of them out")
    if {"batch_size", "images_per_device"} <= set(given):
        raise InputError("--batch-size and --images-per-device contradict each other: leave one of them out")
    constants, predictions = predict_paper()
    by_rule = [prediction.hours for prediction in predict_by_rule()]
    rows = [
        {**prediction.as_dict(), "plain_rule_hours": hours}
        for prediction, hours in zip(predictions, by_rule, strict=True)
    ]
    report: dict[str, Any] = {"rows": rows}
    if arguments.paper:
        report |= {"fraction": constants.fraction, "fixed_hours": constants.fixed_hours}
        if arguments.picture:
            from megdet.paper.times_picture import plot_paper  # here, because matplotlib is slow to load

            plot_paper(predictions, arguments.picture)
    else:
        machine = _machine(given)
        points = simulate_scaling(machine, Asked(**given))
        report["scaling"] = {"device": machine.device, "points": [point.as_dict() for point in points]}
        if arguments.picture:
            from megdet.planning.pictures import plot_scaling

            plot_scaling(points, machine, arguments.picture)
    if arguments.json:
        arguments.print_json(report)
    elif arguments.paper:
        _print_paper(constants, predictions)
    else:
        _print_scaling(machine, points, Asked(**given))


def _machine(given: dict[str, Any]) -> Machine:
    """The machine asked for; removes the options of the machine from `given`."""
    machine = machine_of(given.pop("device", "h200"))
    fraction = given.pop("fraction", machine.fraction)
    if not 0 < fraction <= 1:
        raise InputError(f"--fraction {fraction:g} must be above 0 and at most 1")
    overhead = given.pop("overhead", 1e3 * machine.overhead)
    if overhead < 0:
        raise InputError(f"--overhead {overhead:g} must be at least 0")
    return replace(machine, fraction=fraction, overhead=overhead / 1e3)


def _print_paper(constants: Constants, predictions: list[Prediction]) -> None:
    table = Table("", "row", "paper, hours", "predicted, hours", "error", "plain rule", "its step, s", "ours, s", "")
    by_rule = predict_by_rule()
    for prediction, plain in zip(predictions, by_rule, strict=True):
        note = "calibrated" if prediction.calibrated else "" if prediction.is_good else "missed"
        row = prediction.row
        where = f"Table {row.table[-1]}"
        numbers = (f"{row.hours:.1f}", f"{prediction.hours:.1f}", f"{prediction.error:+z.0%}", f"{plain.error:+z.0%}")
        table.add_row(where, row.name, *numbers, f"{prediction.paper_seconds:.2f}", f"{prediction.seconds:.2f}", note)
    CONSOLE.print(table)
    CONSOLE.print(
        f"Two rows set two constants: {constants.fraction:.1%} of the TITAN Xp's peak, and "
        f"{constants.fixed_hours:.1f} h of a run that more GPUs do not shorten. All else is published or counted."
    )
    CONSOLE.print(_count(predictions) + ".")
    rule = plain_rule()
    CONSOLE.print(
        f"Plain rule: hours = {rule.fixed_hours:.2f} + {rule.slope:.2f} epochs / GPUs, set by the same two rows, knows "
        f"no steps: {_count(by_rule)}. The cost model is for what the rule cannot say: other GPUs and "
        "networks, memory, the parts of a step, where more devices stop paying."
    )
    for prediction in predictions:
        if not prediction.is_good:
            CONSOLE.print(f"missed: Table {prediction.row.table[-1]}, {prediction.row.name}: {prediction.why_missed}.")
    for name, assumptions in OTHERS.items():
        CONSOLE.print(f"other reading: {name}: {_count(predict_paper(assumptions)[1])}.")


def _count(predictions: list[Prediction]) -> str:
    good, others = count_good(predictions)
    return f"{good} of the {others} trainings that set no constant are within {GOOD:.0%}"


def _print_scaling(machine: Machine, points: list[Point], asked: Asked) -> None:
    table = Table("devices", "batch size", "lane x rounds x images", "GB", "seconds a step", "images/s", "efficiency")
    for name in ("communication", "stragglers", "hours", "pays"):
        table.add_column(name)
    for point in points:
        layout, step = point.layout, point.step
        spread = f"{layout.lane_width} x {layout.rounds} x {layout.largest_share}"
        memory = f"{point.memory_bytes / 1e9:.1f}"
        seconds = (f"{step.total:.4f}", f"{point.images_per_second:.0f}", f"{point.efficiency:.0%}")
        parts = (f"{step.communication / step.total:.0%}", f"{step.stragglers / step.total:.0%}", f"{point.hours:.3g}")
        table.add_row(
            str(layout.world_size), str(point.batch_size), spread, memory, *seconds, *parts, point.why_not or "yes"
        )
    CONSOLE.print(table)
    CONSOLE.print(
        f"{machine.device} at {machine.fraction:.3g} of its peak and {1e3 * machine.overhead:g} ms a micro-batch "
        f"({machine.source}): {_verdict(points)}."
    )
    if asked.noise_scale is None:
        CONSOLE.print("Judged by time, memory and warmup only; with --noise-scale also by the size of the batch.")
    if asked.batch_size is None and asked.bn_size > 1:
        sizes = ", ".join(f"{p.batch_size} on {p.layout.world_size}" for p in points if _is_rounded(p, asked))
        if sizes:
            CONSOLE.print(
                f"A batch is whole BN groups of {asked.bn_size} images, so it is rounded up: {sizes} devices."
            )
    if not asked.bn_size:
        CONSOLE.print("Frozen statistics need no groups: a device's share is one micro-batch, or as few as fit.")
    CONSOLE.print(
        "GB of a device: state, one bucket of gradients being sent, and what a micro-batch on the largest canvas keeps "
        f"for the backward, counted in {8 * machine.value_bytes} bits; it fits in {USABLE:.0%} of "
        f"{machine.memory / 1e9:g} GB."
    )
    CONSOLE.print("Hours of the normal policy on COCO's 118,000 images, without evaluation (docs/simulate.md).")


def _is_rounded(point: Point, asked: Asked) -> bool:
    return point.batch_size != asked.images_per_device * point.layout.world_size


def _verdict(points: list[Point]) -> str:
    best = last_that_pays(points)
    if best is None:
        return "no number of devices pays"
    most = ", the most that are simulated" if best is points[-1] else ""
    images = "" if best.worth is None else f"; {best.worth.examples:.2f} times the fewest images for the same loss"
    return f"it pays up to {best.layout.world_size} devices{most}{images}"
