"""The processes and cores that a verb works with."""

from dataclasses import fields
from typing import Any

from megdet.cli.options import CONSOLE, Arguments
from megdet.distributed.world import World, start_world
from megdet.runtime import default_workers
from megdet.training.run import RunOptions


def join_world(arguments: Arguments) -> World:
    """Start or join the processes of this run."""
    return start_world(arguments.device, **arguments.given("timeout"))


def num_workers(arguments: Arguments) -> int:
    """Loading processes of this rank: as asked for, or its share of the cores minus one, from 1 to 8."""
    return default_workers() if arguments.workers is None else int(arguments.workers)


def run_options(arguments: Arguments) -> RunOptions:
    """How a run uses this machine: the options of the verb, and defaults for those that the verb lacks."""
    names = [field.name for field in fields(RunOptions) if field.name != "workers" and field.name in arguments.options]
    return RunOptions(num_workers(arguments), **{name: getattr(arguments.options, name) for name in names})


def say(world: World, message: Any) -> None:
    """Print on rank 0."""
    if world.is_first:
        CONSOLE.print(message)
