"""The examples and exit codes of the help are true."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from megdet.cli.main import VERBS, make_parser
from megdet.cli.options import split_overrides
from megdet.cli.parsers.examples import EXAMPLES, EXIT_CODES
from megdet.recipe_file import load_recipe, packaged_recipes, recipe_keys

DOCS = Path(__file__).parents[2] / "docs/commands.md"
ALL = [example for examples in EXAMPLES.values() for example in examples]


def second_words(parser: argparse.ArgumentParser) -> list[str]:
    found = [own for own in parser._actions if isinstance(own, argparse._SubParsersAction)]
    return [name for own in found for name in own.choices]


def test_every_verb_has_an_example_and_no_other_has() -> None:
    names = set(VERBS)
    for verb in VERBS:
        own = next(a for a in make_parser(verb)._actions if isinstance(a, argparse._SubParsersAction)).choices[verb]
        names |= {f"{verb} {second}" for second in second_words(own)}
    assert set(EXAMPLES) == names
    assert all(
        f"megdet {name}" in example for name, some in EXAMPLES.items() for example in some if "torchrun" not in example
    )


@pytest.mark.parametrize("example", ALL)
def test_every_example_is_taken_by_its_parser(example: str) -> None:
    commands = re.findall(r"(?:-m )?megdet (?:-- )?([^)|]*)", example)
    words = shlex.split(commands[-1])
    options, rest = make_parser(words[0]).parse_known_args(words)
    overrides = split_overrides(rest)
    assert set(overrides) <= set(recipe_keys() if options.takes_overrides else ())
    if getattr(options, "recipe", None) in packaged_recipes():
        load_recipe(options.recipe, overrides)


def test_the_page_of_commands_has_every_verb_and_every_exit_code() -> None:
    page = DOCS.read_text()
    assert all(f"`{verb}`" in page for verb in VERBS)
    assert all(f"| {code} |" in page for code in re.findall(r"\d+", EXIT_CODES))
