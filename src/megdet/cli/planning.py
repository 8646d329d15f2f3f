"""The verb plan."""

import shlex
from collections.abc import Sequence

from rich.table import Table

from megdet.cli.machine import num_workers
from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.distributed.layout import devices_text, recipe_layout
from megdet.errors import InputError
from megdet.planning.inputs import Given
from megdet.planning.layouts import PlannedLayout
from megdet.planning.measurement import GIB
from megdet.planning.measuring import Measuring
from megdet.planning.plan import Limits, Plan, make_plan
from megdet.recipe_check import check_new_recipe
from megdet.recipe_file import load_recipe

_SHOWN = 12


def run_plan(arguments: Arguments) -> None:
    """Measure what the options do not give, plan the run, print the plan."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_new_recipe(recipe)
    if arguments.measured is not None and arguments.seconds_per_image is not None:
        raise InputError("--measured and --seconds-per-image: give only one of them")
    plan = make_plan(
        recipe,
        Limits(
            arguments.devices,
            _scaled(arguments.memory, GIB),
            arguments.hours,
            arguments.lane_width,
            arguments.max_images_per_device,
            arguments.price,
        ),
        Given(
            arguments.measured,
            arguments.seconds_per_image,
            _scaled(arguments.gib_per_image, GIB),
            _scaled(arguments.fixed_gib, GIB),
            _scaled(arguments.bandwidth, 1e9),
            _scaled(arguments.latency, 1e-6),
            arguments.noise_scale,
            arguments.noise_from,
        ),
        Measuring(
            arguments.sizes,
            arguments.plans,
            arguments.device,
            arguments.side_by_side,
            num_workers(arguments),
            **arguments.given("timed_steps"),
        ),
        progress=PROGRESS.print,
    )
    if arguments.json:
        arguments.print_json(plan.as_dict())
        return
    CONSOLE.print(_layouts_table(plan, arguments.recipe))
    words = [arguments.recipe, *(f"--{key}={value}" for key, value in arguments.overrides.items())]
    for line in _sentences(plan, words):
        CONSOLE.print(line)
    if plan.noise_scale is not None:
        CONSOLE.print(_batch_table(plan))
    for assumption in plan.assumptions:
        CONSOLE.print(f"Assumed: {assumption}.")


def _layouts_table(plan: Plan, name: str) -> Table:
    recipe, devices = plan.recipe, plan.limits.devices
    table = Table(
        *("images a forward", "lanes", "lane width", "forwards a step", "recompute", "GiB", "s a step"),
        *("of it sending", "sent, MB", "whole run"),
        *(("cost", "") if plan.limits.price is not None else ("",)),
        title=f"{name} on {devices_text(devices)}: {recipe.batch_size} images a step, BN size {recipe.bn_size}, "
        f"{plan.steps} steps",
    )
    for planned in plan.layouts[:_SHOWN]:
        cost = plan.cost_of(planned)
        table.add_row(*_cells(planned), *([] if cost is None else [_money(cost)]), _remark(planned, plan))
    if len(plan.layouts) > _SHOWN:
        table.caption = f"{len(plan.layouts) - _SHOWN} slower ones are in --json"
    return table


def _cells(planned: PlannedLayout) -> list[str]:
    layout, step = planned.layout, planned.step
    return [
        *map(str, (layout.largest_share, layout.num_lanes, layout.lane_width, layout.rounds, planned.recompute)),
        "?" if planned.bytes is None else f"{planned.bytes / GIB:.2f}",
        f"{step.total:.3g}",
        f"{step.communication:.2g}",
        f"{(planned.gradient_bytes_sent + planned.norm_bytes_sent) / 1e6:.3g}",
        _duration(planned.hours),
    ]


def _remark(planned: PlannedLayout, plan: Plan) -> str:
    words = []
    if planned == plan.chosen:
        words.append("as it is")
    if planned == plan.best:
        words.append("best")
    if planned.fits is False:
        words.append("does not fit")
    return ", ".join(words)


def _sentences(plan: Plan, words: Sequence[str]) -> list[str]:
    lines = []
    limits, best, chosen = plan.limits, plan.best, plan.chosen
    if chosen.fits is False:
        found = [f"{key} {count or 'never'}" for key, count in plan.devices_that_fit.items()]
        memory = 0.0 if limits.memory is None else limits.memory / GIB
        lines.append(f"Devices that hold a step in {memory:.3g} GiB each, by recompute plan: {', '.join(found)}.")
    if best is None:
        lines.append(f"No layout on {devices_text(limits.devices)} fits.")
    else:
        lines.append(f"Run it: {_command(best, plan, words)}")
    if limits.hours is not None:
        fewest = plan.devices_for_hours
        if fewest is not None:
            lines.append(f"Within {limits.hours:g} hours: {_in_words(fewest, plan)}.")
            cheapest = plan.cheapest_for_hours
            if cheapest is not None and cheapest.device_hours < fewest.device_hours:
                lines.append(f"The cheapest within {limits.hours:g} hours: {_in_words(cheapest, plan)}.")
        elif plan.fastest is not None:
            fast = plan.fastest
            lines.append(
                f"Within {limits.hours:g} hours: no number of devices; the shortest run takes "
                f"{_duration(fast.hours)} on {devices_text(fast.layout.world_size)}."
            )
    if plan.noise_scale is None:
        lines.append("Which batch sizes pay: give --noise-scale, or --noise-from a run that has measured it.")
    return lines


def _in_words(planned: PlannedLayout, plan: Plan) -> str:
    """Devices, hours, layout and, where a price is given, the cost of a layout."""
    layout, cost = planned.layout, plan.cost_of(planned)
    return (
        f"{devices_text(layout.world_size)}, {_duration(planned.hours)} with lane width {layout.lane_width} "
        f"and recompute {planned.recompute}{'' if cost is None else f', cost {_money(cost)}'}"
    )


def _command(best: PlannedLayout, plan: Plan, words: Sequence[str]) -> str:
    """The command that trains with this layout; `words` are the recipe and the changed keys."""
    count = best.layout.world_size
    start = "megdet train" if count == 1 else f"torchrun --nproc-per-node {count} -m megdet -- train"
    more = []
    if best.recompute != plan.recipe.recompute:
        more.append(f"--recompute={best.recompute}")
    if best.layout != recipe_layout(plan.recipe, count):
        more.append(f"--lane-width={best.layout.lane_width}")
    return f"{start} {shlex.join([*words, *more])}"


def _batch_table(plan: Plan) -> Table:
    table = Table(
        *("batch size", "steps", "examples", f"training on {devices_text(plan.limits.devices)}"),
        *("devices in proportion", "training on these", "pays"),
        title=f"For the same loss, with a noise scale of {plan.noise_scale:.4g} images (times the recipe's)",
    )
    for size in plan.batch_sizes:
        table.add_row(
            str(size.batch_size),
            f"{size.steps:.2f}",
            f"{size.examples:.2f}",
            "-" if size.hours is None else _duration(size.hours),
            "-" if size.hours_in_step is None else str(size.devices_in_step),
            "-" if size.hours_in_step is None else _duration(size.hours_in_step),
            "yes" if size.pays else "no",
        )
    return table


def _duration(hours: float) -> str:
    """Three digits, in a suitable unit."""
    for unit, length in (("days", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= (2 if unit == "days" else 1) * length:
            return f"{hours / length:.3g} {unit}"
    return f"{hours * 3600:.3g} s"


def _money(cost: float) -> str:
    """Two decimals below 100, none above."""
    return f"{cost:,.2f}" if cost < 100 else f"{cost:,.0f}"


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
