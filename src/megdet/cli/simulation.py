"""The verb simulate: predicts times on clusters."""

from dataclasses import replace
from typing import Any, NamedTuple

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
from megdet.planning.published import PLAIN, TUNED, USABLE, Machine, Speed, machine_of
from megdet.planning.published_speeds import PUBLISHED_SPEEDS, mean_errors
from megdet.planning.scaling import Asked, Point, last_that_pays, simulate_scaling

_SCALING = ("device", "images_per_device", "bn_size", "batch_size", "noise_scale", "fraction", "overhead")


class _Simulated(NamedTuple):
    """The scaling at one speed of programs."""

    name: str
    machine: Machine
    points: list[Point]

    def as_dict(self) -> dict[str, Any]:
        speed = self.machine.speed
        own = {"name": self.name, "fraction": speed.fraction, "overhead_ms": 1e3 * speed.overhead}
        return {**own, "points": [point.as_dict() for point in self.points]}


def run_simulate(arguments: Arguments) -> None:
    """Print the paper's rows or published speeds beside their predictions, or the scaling of current devices."""
    given = {name: getattr(arguments, name) for name in _SCALING if getattr(arguments, name) is not None}
    of_published = [name for name in ("paper", "published") if getattr(arguments, name)]
    if of_published and given:
        name = next(iter(given)).replace("_", "-")
        raise InputError(f"--{name} has no effect with --{of_published[0]}: leave one of them out")
    if len(of_published) == 2:
        raise InputError("--paper and --published are two tables: ask for one of them")
    if arguments.published and arguments.picture:
        raise InputError("--published has no picture: leave --picture out")
    if {"batch_size", "images_per_device"} <= set(given):
        raise InputError("--batch-size and --images-per-device contradict each other: leave one of them out")
    if arguments.paper:
        _simulate_paper(arguments)
    elif arguments.published:
        _simulate_published(arguments)
    else:
        _simulate_scaling(arguments, given)


def _simulate_paper(arguments: Arguments) -> None:
    constants, predictions = predict_paper()
    by_rule = [prediction.hours for prediction in predict_by_rule()]
    rows = [
        {**prediction.as_dict(), "plain_rule_hours": hours}
        for prediction, hours in zip(predictions, by_rule, strict=True)
    ]
    if arguments.picture:
        from megdet.paper.times_picture import plot_paper  # here, because matplotlib is slow to load

        plot_paper(predictions, arguments.picture)
    if arguments.json:
        arguments.print_json({"rows": rows, "fraction": constants.fraction, "fixed_hours": constants.fixed_hours})
    else:
        _print_paper(constants, predictions)


def _simulate_scaling(arguments: Arguments, given: dict[str, Any]) -> None:
    machines = _machines(given)
    asked = Asked(**given)
    simulated = [_Simulated(name, machine, simulate_scaling(machine, asked)) for name, machine in machines.items()]
    if arguments.picture:
        from megdet.planning.pictures import plot_scaling

        plot_scaling([(own.name, own.points) for own in simulated], simulated[0].machine.device, arguments.picture)
    if arguments.json:
        speeds = [own.as_dict() for own in simulated]
        arguments.print_json({"scaling": {"device": simulated[0].machine.device, "speeds": speeds}})
    else:
        _print_scaling(simulated, asked)


def _machines(given: dict[str, Any]) -> dict[str, Machine]:
    """The machine asked for at each speed; removes the options of the machine from `given`."""
    machine = machine_of(given.pop("device", "h200"))
    if not {"fraction", "overhead"} & set(given):
        return {name: replace(machine, speed=speed) for name, speed in {"plain": PLAIN, "tuned": TUNED}.items()}
    fraction = given.pop("fraction", PLAIN.fraction)
    if not 0 < fraction <= 1:
        raise InputError(f"--fraction {fraction:g} must be above 0 and at most 1")
    overhead = given.pop("overhead", 1e3 * PLAIN.overhead)
    if overhead < 0:
        raise InputError(f"--overhead {overhead:g} must be at least 0")
    return {"given": replace(machine, speed=Speed(fraction, overhead / 1e3))}


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


def _simulate_published(arguments: Arguments) -> None:
    if arguments.json:
        arguments.print_json({"published": [own.as_dict() for own in PUBLISHED_SPEEDS]})
        return
    table = Table("GPUs", "images a GPU", "published, images/s", "predicted", "error", "plain rule", "")
    for own in PUBLISHED_SPEEDS:
        row = own.as_dict()
        numbers = (f"{own.images_per_second:.4g}", f"{own.predicted(own.speed):.4g}")
        errors = (f"{row['error']:+z.0%}", f"{row['plain_rule_error']:+z.0%}")
        note = "calibrated" if own.calibrates else ""
        table.add_row(f"{own.devices} x {own.machine.device}", str(own.micro_batch), *numbers, *errors, note)
    CONSOLE.print(table)
    ours, rule = mean_errors(PUBLISHED_SPEEDS)
    others = sum(not own.calibrates for own in PUBLISHED_SPEEDS)
    CONSOLE.print(
        f"Mask R-CNN in 16 bits. Mean error of the {others} speeds that set nothing: {ours:.1%}, of the plain rule "
        f"{rule:.1%}, which is the same line through the same speeds of one GPU, times the GPUs."
    )
    sources = dict.fromkeys(own.source for own in PUBLISHED_SPEEDS)
    CONSOLE.print(f"Sources: {'; '.join(sources)}. docs/simulate.md says what follows.")


def _print_scaling(simulated: list[_Simulated], asked: Asked) -> None:
    table = Table("devices", "batch size", "lane x rounds x images", "GB", "seconds a step", "images/s", "efficiency")
    for name in ("communication", "stragglers", "hours", "pays"):
        table.add_column(name)
    for at_speeds in zip(*(own.points for own in simulated), strict=True):
        first, layout = at_speeds[0], at_speeds[0].layout
        spread = f"{layout.lane_width} x {layout.rounds} x {layout.largest_share}"
        ranges = (
            _range([f"{point.step.total:.4f}" for point in at_speeds]),
            _range([f"{point.images_per_second:.0f}" for point in at_speeds]),
            _range([f"{point.efficiency:.0%}" for point in at_speeds]),
            _range([f"{point.step.communication / point.step.total:.0%}" for point in at_speeds]),
            _range([f"{point.step.stragglers / point.step.total:.0%}" for point in at_speeds]),
            _range([f"{point.hours:.3g}" for point in at_speeds]),
        )
        pays = _range([point.why_not or "yes" for point in at_speeds], "; ")
        memory = f"{first.memory_bytes / 1e9:.1f}"
        table.add_row(str(layout.world_size), str(first.batch_size), spread, memory, *ranges, pays)
    CONSOLE.print(table)
    machine, points = simulated[0].machine, simulated[0].points
    for own in simulated:
        speed = own.machine.speed
        CONSOLE.print(
            f"{machine.device}, {_SPEEDS[own.name]}, {speed.fraction:.3g} of its peak and "
            f"{1e3 * speed.overhead:.3g} ms a micro-batch: {_verdict(own.points)}."
        )
    CONSOLE.print(f"Devices and networks: {machine.source}.")
    if len(simulated) > 1:
        CONSOLE.print("Two numbers are the two speeds: plain, tuned. --fraction and --overhead set one of your own.")
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


_SPEEDS = {
    "plain": "plain programs (PyTorch in 2019)",
    "tuned": "tuned ones (entries to MLPerf)",
    "given": "as given",
}


def _range(values: list[str], between: str = ", ") -> str:
    """The values of the speeds; one if they are the same."""
    return between.join(dict.fromkeys(values))


def _is_rounded(point: Point, asked: Asked) -> bool:
    return point.batch_size != asked.images_per_device * point.layout.world_size


def _verdict(points: list[Point]) -> str:
    best = last_that_pays(points)
    if best is None:
        return "no number of devices pays"
    most = ", the most that are simulated" if best is points[-1] else ""
    images = "" if best.worth is None else f"; {best.worth.examples:.2f} times the fewest images for the same loss"
    return f"it pays up to {best.layout.world_size} devices{most}{images}"
