"""Shared by all verbs: their options and overrides as one object, and the consoles."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megdet.errors import InputError
from megdet.run_folder.folder import encode_non_finite
from megdet.terminal import Terminal

CONSOLE = Terminal()
PROGRESS = Terminal(stderr=True)


@dataclass(frozen=True)
class Arguments:
    """The options of a verb, and the recipe keys that were overridden on the command line."""

    options: argparse.Namespace
    overrides: dict[str, str]
    results: TextIO = field(default_factory=lambda: sys.stdout)
    """where the JSON object goes; with --json nothing else does"""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.options, name)

    def print_json(self, content: Mapping[str, Any]) -> None:
        """With --json, print this object to standard output; nothing else is printed there."""
        if self.options.json:
            print(json.dumps(encode_non_finite(content), allow_nan=False), file=self.results)

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named options that were given; the called function has defaults for the others."""
        return {name: value for name in names if (value := getattr(self.options, name)) is not None}


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


def existing_file(text: str) -> Path:
    """The path of a file that must exist. Raises InputError."""
    path = Path(text)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path
