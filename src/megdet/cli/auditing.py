"""The verb that checks whether a run is what it claims to be: audit."""

import os
import secrets
from pathlib import Path

from megdet.cli.machine import num_workers
from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.distributed.world import start_world
from megdet.errors import InputError
from megdet.run_folder.folder import RunFolder
from megdet.studies.audit.audit import Request, audit, recorded_device


def run_audit(arguments: Arguments) -> None:
    """Check the run, print the verdict; exit code 1 unless it holds."""
    if arguments.devices is not None and "WORLD_SIZE" in os.environ:
        raise InputError(
            "under torchrun the devices are its processes: leave --devices out, or run it without torchrun"
        )
    folder = Path(arguments.run)
    seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    request = Request(
        folder, seed, **arguments.given("steps", "stretches"), head=arguments.head, overrides=arguments.overrides
    )
    device = arguments.device or recorded_device(RunFolder(folder))
    world = start_world(device, **arguments.given("timeout"))

    def say(message: str) -> None:
        if world.is_first:
            PROGRESS.print(message)

    found = audit(request, world, arguments.devices, num_workers(arguments), say)
    if world.is_first:
        arguments.print_json(found.as_dict())
        for fault in found.faults[1:]:
            CONSOLE.print(f"fault    {fault}")
        for note in found.notes:
            CONSOLE.print(f"note     {note}")
        if found.places:
            CONSOLE.print(f"places   a stretch can begin after {_shown(found.places)}; drawn by --seed {found.seed}")
        if found.head:
            CONSOLE.print(f"head     {found.head}")
        CONSOLE.print(f"verdict  {found.sentence}")
    if not found.holds:
        raise SystemExit(1)


def _shown(places: tuple[int, ...]) -> str:
    words = ", ".join(f"step {place}" if place else "the start" for place in places[:8])
    return words if len(places) <= 8 else f"{words} and {len(places) - 8} more"
