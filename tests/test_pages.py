"""What the README and the pages of the site say can be done: commands, options, links, tables of keys."""

import importlib.util
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from megdet.cli.main import VERBS, make_parser
from megdet.cli.options import split_overrides
from megdet.recipe_file import load_recipe, packaged_recipes, recipe_keys

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name for page in PAGES]
OTHERS = re.compile(r"^(cd|curl|export|kubectl|sbatch|sha256sum|source|NNODES=|megdet completion)\b|^NNODES=")
"""Programs of others, in lines whose words say for themselves what they do."""


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page_commands = load(".ci/page_commands.py")
COMMANDS = sorted(
    {(page.name, command) for page in PAGES for command, _ in page_commands.commands(page.read_text(encoding="utf-8"))}
)


@cache
def outline(page: Path) -> set[str]:
    """The names by which the headings of a page are linked to, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_of_a_page_is_one_that_there_is(page: str, command: str) -> None:
    words = shlex.split(command.split(" > ")[0].split(" | ")[0])
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(\w+)\]", words[2])) <= set(extras)
    elif words[0] == "python":
        assert words[1] == "-m" or (ROOT / words[1]).is_file()
    elif words[0] == "megdet" or (words[0] == "torchrun" and "megdet" in words):
        ours = [word for word in words[words.index("megdet") + 1 :] if word != "--"]
        options, rest = make_parser(ours[0]).parse_known_args(ours)
        overrides = split_overrides(rest)
        assert set(overrides) <= set(recipe_keys() if options.takes_overrides else ())
        if getattr(options, "recipe", None) in packaged_recipes():
            load_recipe(options.recipe, overrides)
    else:
        assert OTHERS.match(command), f"{page}: what is this?"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_verbs_and_options_within_sentences_are_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for inline in re.findall(r"`megdet ([a-z][^`]*)`", text):
        words = inline.split()
        assert words[0] in VERBS, inline
        usage = " ".join(second_usage(words[0], words[1] if len(words) > 1 else ""))
        for option in (word for word in words if word.startswith("--")):
            assert option in usage or option[2:] in recipe_keys(), inline


def second_usage(verb: str, second: str) -> list[str]:
    """Every option of a verb, and of its second word."""
    parser = make_parser(verb)
    found: list[str] = []
    for word in (verb, second):
        choices = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
        if not choices or word not in choices[0]:
            break
        parser = choices[0][word]
        found += parser._option_string_actions
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_to_a_heading_finds_it(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+#[^)\s]+)\)|\]\((#[^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, heading = (link[0] or link[1]).partition("#")
        if not file.startswith("http"):
            assert heading in outline((page.parent / file) if file else page), f"{page.name}: {file}#{heading}"


def test_every_page_is_in_the_table_of_contents_once() -> None:
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = [line for block in re.findall(r"```{toctree}\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    pages = [line for line in listed if line and not line.startswith(":")]
    assert sorted(pages) == sorted(page.stem for page in (ROOT / "docs").glob("*.md") if page.stem != "index")


def test_keys_that_the_page_for_users_of_other_trainers_names_are_keys_of_a_recipe() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs/coming_from.md").read_text().splitlines() if " | " in line]
    keys = {key for row in rows for key in re.findall(r"`(?:--)?([a-z_]+(?:\.[a-z_0-9]+)+)\b", row[1])}
    keys = {key for key in keys if key.split(".")[0] in {known.split(".")[0] for known in recipe_keys()}}
    assert len(keys) > 20
    assert keys <= set(recipe_keys())


def test_a_block_that_is_not_run_says_why() -> None:
    marks = [mark for page in PAGES for mark in re.findall(r"<!-- not in CI:(.*?)-->", page.read_text(), re.DOTALL)]
    assert all(len(mark.split()) >= 1 for mark in marks)
    for command in page_commands.commands_to_run():
        assert not re.search(r"\b(RECIPE|RUN|WEIGHTS|HOST|my\.yaml)\b", command), "it cannot run as it stands"
