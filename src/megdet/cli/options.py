"""What the verbs share: recipe keys as options, the machine's options, output."""

import argparse
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from megdet.distributed.world import DEFAULT_TIMEOUT, World, start_world
from megdet.errors import InputError
from megdet.journal.environment import usable_cores
from megdet.recipe_help import recipe_parser
from megdet.terminal import Terminal

CONSOLE = Terminal()
PROGRESS = Terminal(stderr=True)


@dataclass(frozen=True)
class Arguments:
    """The options of a verb, and the recipe keys that were overridden on the command line."""

    options: argparse.Namespace
    overrides: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.options, name)


def split_overrides(words: list[str]) -> dict[str, str]:
    """`--key value` and `--key=value` as a dictionary. Raises InputError for a word that is no option."""
    overrides: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise InputError(f"unexpected argument '{word}'")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"option '--{key}' needs a value")
            value = rest.pop(0)
        overrides[key] = value
    return overrides


def add_recipe_keys(parser: argparse.ArgumentParser) -> None:
    """Say in the help that every key of the recipe is an option, with its meaning."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    keys = recipe_parser("recipe").format_help().split("\n\n", 1)[1]
    parser.epilog = "Every key of the recipe is an option too:\n\n" + keys
    parser.set_defaults(takes_overrides=True)


def add_machine_options(parser: argparse.ArgumentParser, *, trains: bool = False) -> None:
    """Options that belong to this machine; none of them changes a result. Some are for verbs that train alone."""
    group = parser.add_argument_group("this machine (none of it changes the result)")
    group.add_argument("--device", default="", metavar="cpu|cuda", help="default: the GPU where there is one")
    group.add_argument(
        "--workers", type=whole_number, default=None, metavar="N", help="processes a rank that load images"
    )
    group.add_argument(
        "--timeout",
        type=minutes,
        default=DEFAULT_TIMEOUT,
        metavar="MINUTES",
        help=f"how long a process waits for another one, default {DEFAULT_TIMEOUT.total_seconds() / 60:.0f}",
    )
    if not trains:
        return
    group.add_argument(
        "--evaluate-in-background",
        action="store_true",
        help="evaluate each checkpoint in a process of its own, while the training goes on",
    )
    group.add_argument(
        "--evaluate-on",
        default="",
        metavar="cpu|cuda|cuda:N",
        help="device of that process, default: on a machine that trains on GPUs one that is left over, else the CPU",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile backbone, pyramid and RPN head for each canvas (torch.compile); results differ by rounding only",
    )


def add_layout_options(parser: argparse.ArgumentParser) -> None:
    """Options that force the layout."""
    parser.add_argument("--lane-width", type=whole_number, metavar="K", help="force the ranks that carry one group")
    parser.add_argument(
        "--max-images-per-device", type=whole_number, metavar="M", help="force the largest micro-batch of a device"
    )


def whole_number(text: str) -> int:
    """An integer of at least 0, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return number


def minutes(text: str) -> timedelta:
    """A time of more than 0 minutes, for argparse."""
    try:
        found = timedelta(minutes=float(text))
    except (ValueError, OverflowError):
        found = timedelta(0)
    if not timedelta(milliseconds=1) <= found <= timedelta(days=365):  # gloo and NCCL count milliseconds
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of minutes above 0")
    return found


def num_workers(arguments: Arguments) -> int:
    """Loading processes of this rank: as asked, or its share of the cores less one, at least 1 and at most 8."""
    if arguments.workers is not None:
        return int(arguments.workers)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, usable_cores() // local_ranks - 1))


def join_world(arguments: Arguments) -> World:
    """Start or join the processes of this run."""
    return start_world(arguments.device, arguments.timeout)


def say(world: World, message: Any) -> None:
    """Print on rank 0."""
    if world.is_first:
        CONSOLE.print(message)


def existing_file(text: str) -> Path:
    """The path of a file that must exist. Raises InputError."""
    path = Path(text)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path
