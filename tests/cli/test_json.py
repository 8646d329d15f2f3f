"""With --json standard output has one strict JSON object, whatever else is printed."""

import json
import math

import pytest

from megdet.cli import describing
from megdet.cli.main import main
from megdet.cli.options import CONSOLE, Arguments


def test_what_other_packages_and_our_tables_print_goes_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(arguments: Arguments) -> None:
        print("* a tracker greets")
        CONSOLE.print("a table")
        arguments.print_json({"numbers": [1.5, math.nan], "last": -math.inf})
        print("* a tracker says goodbye")

    monkeypatch.setattr(describing, "run_recipes", chatty)
    assert main(["recipes", "--json"]) == 0
    printed = capsys.readouterr()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(printed.out, parse_constant=refuse) == {"numbers": [1.5, "NaN"], "last": "-Infinity"}
    assert printed.err.splitlines() == ["* a tracker greets", "a table", "* a tracker says goodbye"]
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out.splitlines() == ["* a tracker greets", "a table", "* a tracker says goodbye"]
