"""Verbs that look at recipes: describe, recipes."""

import dataclasses

from rich.table import Table

from megdet.cli.options import CONSOLE, Arguments
from megdet.cli.parsers.shared import ADVICE_OPTIONS
from megdet.errors import InputError
from megdet.planning.describe import describe
from megdet.program import load_function
from megdet.recipe_check import check_new_recipe
from megdet.recipe_file import load_recipe, packaged_recipes


def run_describe(arguments: Arguments) -> None:
    """Print the arithmetic of a recipe."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_new_recipe(recipe)
    if arguments.parameters:  # only a command may keep packages out of its process while it loads
        load_function("megdet.planning.counting:meta_detector")
    rows = describe(
        recipe,
        arguments.devices,
        arguments.lane_width,
        arguments.max_images_per_device,
        count_parameters=arguments.parameters,
    )
    arguments.print_json({row.key: row.value for row in rows})
    table = Table("", "", title=f"{arguments.recipe} on {arguments.devices} device(s)", show_header=False)
    for row in rows:
        table.add_row(row.name, row.text)
    CONSOLE.print(table)


def run_recipes(arguments: Arguments) -> None:
    """List the packaged recipes with the first line of their header, print one, or write a new one."""
    if arguments.name == "new":
        from megdet.cli.advising import run_new  # here, because it reads data sets

        run_new(arguments)
        return
    _refuse_options_of_new(arguments)
    recipes = packaged_recipes()
    if arguments.name is not None:
        if arguments.name not in recipes:
            load_recipe(arguments.name)  # raises InputError, which lists the names
        CONSOLE.print(recipes[arguments.name], end="")
        arguments.print_json(dataclasses.asdict(load_recipe(arguments.name)))
        return
    table = Table("recipe", "what it is")
    for name, text in recipes.items():
        table.add_row(name, _what_it_is(text))
    CONSOLE.print(table)
    arguments.print_json({name: _what_it_is(text) for name, text in recipes.items()})


def _refuse_options_of_new(arguments: Arguments) -> None:
    given = arguments.given("new_name", "data", "val", *ADVICE_OPTIONS)
    if given:
        what = given.get("new_name") or "--" + next(iter(given)).replace("_", "-")
        raise InputError(f"unexpected '{what}': only `megdet recipes new NAME --data ANNOTATIONS IMAGES` takes it")


def _what_it_is(recipe: str) -> str:
    """The first line of a recipe's header."""
    return recipe.splitlines()[0].removeprefix("# ")
