"""The verb replay: makes a step of a run again."""

import math
from pathlib import Path

from rich.table import Table

from megdet.cli.machine import join_world, run_options
from megdet.cli.options import CONSOLE, Arguments
from megdet.files import make_folder, write_json_atomically
from megdet.studies.replay.replay import Replay, Request, replay

_SHOWN = 20
"""Images in the table: those with the largest losses."""


def run_replay(arguments: Arguments) -> None:
    """Make the step again and print its numbers; exit code 1 if they are not those in metrics.jsonl."""
    folder = Path(arguments.run)
    out = arguments.out or folder / "replay" / f"step_{arguments.step:08d}"
    request = Request(
        folder,
        arguments.step,
        out,
        arguments.image or "",
        arguments.without or "",
        arguments.roll_backs,
        arguments.overrides,
    )
    devices = arguments.devices
    world = join_world(arguments) if devices == 1 else None
    found = replay(request, world, devices, run_options(arguments), device=arguments.device)
    make_folder(out)
    write_json_atomically(out / "replay.json", found.as_dict(), indent=2)
    if arguments.json:
        arguments.print_json(found.as_dict())
    else:
        _show(found)
        CONSOLE.print(f"numbers  {out / 'replay.json'}")
        for picture in found.pictures:
            CONSOLE.print(f"picture  {picture}")
    if found.comparison.first_wrong is not None:
        raise SystemExit(1)


def _show(found: Replay) -> None:
    where = f"checkpoint of step {found.started_from}" if found.started_from else "start of the run"
    without = f", without image {found.without}" if found.without else ""
    numbers = found.numbers
    CONSOLE.print(
        f"step {found.step}{without}, from the {where}, on {found.devices} device(s): loss {numbers['loss']:.6g}, "
        f"gradient norm {numbers['gradient_norm']:.6g}, learning rate {found.rate:.4g}"
    )
    if why := numbers.get("left_out"):
        CONSOLE.print(f"its update is left out: {why}")
    CONSOLE.print(_images_table(found))
    table = Table("part", "gradient norm")
    for part, norm in found.norms.items():
        table.add_row(part, f"{norm:.6g}")
    CONSOLE.print(table)
    CONSOLE.print(_first_fault(found))
    CONSOLE.print(found.comparison.sentence())


def _images_table(found: Replay) -> Table:
    ordered = sorted(found.images, key=lambda own: own.loss if math.isfinite(own.loss) else math.inf, reverse=True)
    names = list(ordered[0].losses) if ordered else []
    left = f", {_SHOWN} of {len(ordered)}" if len(ordered) > _SHOWN else ""
    table = Table("image", "file", "loss", *(name.replace("_", " ") for name in names), title=f"losses by image{left}")
    for own in ordered[:_SHOWN]:
        table.add_row(str(own.image_id), own.file_name, f"{own.loss:.5g}", *(f"{own.losses[n]:.5g}" for n in names))
    return table


def _first_fault(found: Replay) -> str:
    """The first value that is not finite, in the order of the computation."""
    if (first := found.not_finite) is not None:
        images = ", ".join(map(str, first.image_ids))
        return f"the first layer that is not finite: {first.layer}, of image {images}"
    wrong = [
        f"{name} of image {own.image_id}"
        for own in found.images
        for name, value in own.losses.items()
        if not math.isfinite(value)
    ]
    if wrong:
        return f"every layer's output is finite, but the loss {wrong[0]} is not"
    if found.wrong_gradients:
        name = found.wrong_gradients[0]
        return f"every loss is finite; in the backward the first gradient that is not is that of {name}"
    return "every layer, loss and gradient is finite"
