"""Options that several verbs have, and the help on the keys of recipes."""

import argparse
import sys
from typing import Any, NoReturn

from megdet.cli.parsers.examples import EXAMPLES, EXIT_CODES
from megdet.cli.parsers.values import at_least_one, minutes, positive, whole_number
from megdet.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are InputErrors and whose help can explain the keys of recipes."""

    explains_recipe_keys = False

    def error(self, message: str) -> NoReturn:
        """Raise the error as one line, without the usage."""
        raise InputError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but the value of a recipe's key is never taken for the argument RECIPE or RUN."""
        words, keys = list(sys.argv[1:] if args is None else args), list[str]()
        if self.get_default("takes_overrides"):
            words, keys = self._without_keys(words)
        found, rest = super().parse_known_args(words, namespace)
        return found, [*rest, *keys]

    def _without_keys(self, words: list[str]) -> tuple[list[str], list[str]]:
        """The words without the keys of a recipe and their values, and these. Raises InputError for no known key."""
        left, taken, is_value = list[str](), list[str](), False
        end = words.index("--") if "--" in words else len(words)  # what follows are arguments
        for word in words[:end]:
            option, equals, _ = word.partition("=")
            is_key = option.startswith("--") and option not in self._option_string_actions
            if is_key and "." not in option:  # of one inside a section the recipe's own `model.kind` decides
                from megdet.recipe_file import check_key  # here, because it takes a tenth of a second

                check_key(option[2:], beside=[own[2:] for own in self._option_string_actions if own.startswith("--")])
            (taken if is_key or (is_value and not word.startswith("--")) else left).append(word)
            is_value = is_key and not equals
        return [*left, *words[end:]], taken

    def format_help(self) -> str:
        """The options of the verb, then the keys of the recipe, section by section."""
        own = super().format_help() + self._examples()
        if not self.explains_recipe_keys:
            return own
        from megdet.recipe_help import recipe_parser  # here, because only the help needs it

        keys = recipe_parser("recipe").format_help().split("\n\n", 1)[1]
        return f"{own}\nEvery key of the recipe is an option too (docs/recipe.md):\n\n{keys}"

    def _examples(self) -> str:
        """The examples of the verb and its exit codes; `megdet --help` has the codes only."""
        examples = EXAMPLES.get(self.prog.partition(" ")[2], ())
        lines = ["", "examples:", *(f"  {example}" for example in examples)] if examples else []
        return "\n".join([*lines, "", f"exit codes: {EXIT_CODES} (docs/commands.md)", ""])


def take_recipe_keys(parser: Parser) -> None:
    """Let a verb that builds a recipe take the recipe's keys as options; its help explains each."""
    parser.explains_recipe_keys = True
    parser.set_defaults(takes_overrides=True)


def add_recipe(parser: Parser) -> None:
    """Add the argument RECIPE."""
    parser.add_argument("recipe", metavar="RECIPE", help="name of a packaged recipe or path of a YAML file")


def take_keys_of_run(parser: Parser, example: str, of: str = "the run's recipe") -> None:
    """Let a verb that works on a run take the keys of its recipe as options; the help says so in one line."""
    parser.epilog = f"Keys of {of} are options too, such as {example}; docs/recipe.md lists them."
    parser.set_defaults(takes_overrides=True)


def add_json(parser: Parser, what: str = "") -> None:
    """Add --json; `what` describes the object that it prints."""
    more = f": {what}" if what else ""
    parser.add_argument(
        "--json",
        action="store_true",
        help=f"print one JSON object to standard output, all else to standard error{more}",
    )


ADVICE_OPTIONS = ("short_edge", "mark", "batch_size", "epochs", "backbone", "weights")
"""The options of `add_advice_options`, as attributes; they are None where they were not given."""


def add_advice_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Options by which a user decides what would be advised."""
    parser.add_argument("--short-edge", type=at_least_one, metavar="PX", help="resize the shorter edge to this")
    parser.add_argument(
        "--mark",
        type=positive,
        metavar="PX",
        help="size, in pixels of the files, of the smallest mark that tells two classes apart",
    )
    parser.add_argument("--batch-size", type=at_least_one, metavar="N", help="images of an update")
    parser.add_argument("--epochs", type=at_least_one, metavar="N", help="length of the run")
    parser.add_argument(
        "--backbone",
        choices=["mobilenetv2_100", "resnet18", "resnet50"],
        help="default mobilenetv2_100; resnet50 is the paper's, for GPUs",
    )
    parser.add_argument("--weights", metavar="FILE", help="trained weights of the backbone; default random weights")


def add_layout_options(parser: Parser) -> None:
    """Options that force the layout."""
    parser.add_argument("--lane-width", type=whole_number, metavar="K", help="force the ranks that carry one group")
    parser.add_argument(
        "--max-images-per-device", type=whole_number, metavar="M", help="force the largest micro-batch of a device"
    )


def add_machine_options(parser: Parser, *, trains: bool = False, minutes_waited: str = "30") -> None:
    """Options of this machine; none of them changes a result. `trains` adds those of verbs that train."""
    group = parser.add_argument_group("this machine (none of it changes the result)")
    group.add_argument("--device", default="", metavar="cpu|cuda", help="default: the GPU where there is one")
    group.add_argument("--workers", type=whole_number, metavar="N", help="processes a rank that load images")
    group.add_argument(
        "--timeout",
        type=minutes,
        metavar="MINUTES",
        help=f"how long a process waits for another one, default {minutes_waited}",
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
        help="device of that process, default: a GPU that the training leaves free, else the CPU",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile backbone, pyramid and RPN head for each canvas (torch.compile); results differ by rounding only",
    )
    group.add_argument("--plain", action="store_true", help="print lines, even if the terminal could show a screen")
