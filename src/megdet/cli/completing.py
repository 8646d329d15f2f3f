"""The verb completion: writes the script with which a shell completes MegDet's commands.

The script holds what the parsers say: verbs, options with their few values, names of packaged recipes, keys of recipes.
Nothing of MegDet runs when Tab is pressed.
"""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from megdet.cli.main import VERBS, make_parser
from megdet.cli.options import Arguments
from megdet.recipe_file import packaged_recipes
from megdet.recipe_help import sections


@dataclass(frozen=True)
class Option:
    """An option, and its values if it takes one of a few words."""

    name: str
    values: tuple[str, ...]
    takes_value: bool
    help: str


@dataclass(frozen=True)
class Command:
    """A verb, or a verb and its second word (`data check`), and what may follow on the command line."""

    words: str
    help: str
    options: tuple[Option, ...]
    first: tuple[str, ...]
    """the words that its first argument may be (second words, choices, recipes); empty if that is a file"""
    takes_keys: bool
    """whether the keys of a recipe are options too"""


def run_completion(arguments: Arguments) -> None:
    """Print the script."""
    print({"bash": bash_script, "zsh": zsh_script, "fish": fish_script}[arguments.shell](), end="")


@cache
def commands() -> tuple[Command, ...]:
    """Every verb, from its parser."""
    found: list[Command] = []
    for name, verb in VERBS.items():
        top = make_parser(name)
        found += _commands(name, verb.help, _second_parsers(top)[name])
    return tuple(found)


@cache
def recipe_options() -> tuple[Option, ...]:
    """Every key of a recipe as an option; a key that several kinds of detectors have comes once."""
    knobs = {knob.key: knob for section in sections() for knob in section.knobs}
    return tuple(
        Option(f"--{key}", knob.choices or (("true", "false") if knob.kind == "bool" else ()), True, knob.meaning)
        for key, knob in knobs.items()
    )


def _commands(words: str, text: str, parser: argparse.ArgumentParser) -> Iterator[Command]:
    second = _second_parsers(parser)
    options = tuple(
        Option(name, tuple(map(str, action.choices or ())), action.nargs != 0, action.help or "")
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--")
    )
    first: tuple[str, ...] = tuple(second)
    for action in parser._actions:
        if not action.option_strings and not second:
            names = packaged_recipes() if action.metavar in ("RECIPE", "NAME") else action.choices or ()
            first = tuple(map(str, names))
            break
    yield Command(words, text, options, first, bool(parser.get_default("takes_overrides")))
    for name, own in second.items():
        yield from _commands(f"{words} {name}", own.description or "", own)


def _second_parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the words that may follow, by word."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def bash_script() -> str:
    """For bash: `source <(megdet completion bash)`."""
    lines = ["# completion of megdet for bash: source <(megdet completion bash)", "_megdet() {"]
    lines += [
        '    local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words="" keys="" first=""',
        '    local verb="${COMP_WORDS[1]}" place=2 files=yes',
        f"    if (( COMP_CWORD == 1 )); then words={_listed((*VERBS, '--help', '--version'))} files=",
        "    else",
        '        case "$verb" in',
        *(
            f'            {name}) (( COMP_CWORD > 2 )) && verb="{name} ${{COMP_WORDS[2]}}" place=3 ;;'
            for name in _pairs()
        ),
        "        esac",
        '        case "$verb" in',
    ]
    for command in commands():
        own = [option.name for option in command.options]
        keys = " keys=yes" if command.takes_keys else ""
        lines.append(
            f"            {shlex.quote(command.words)}) words={_listed(own)} first={_listed(command.first)}{keys} ;;"
        )
    lines += [
        "        esac",
        f"        [[ -n $keys ]] && words+={_listed([''] + [option.name for option in recipe_options()])}",
        '        case "$verb $before" in',
    ]
    for command in commands():
        for option in command.options:
            if option.values:
                place = shlex.quote(f"{command.words} {option.name}")
                lines.append(f"            {place}) words={_listed(option.values)} first= files= ;;")
    for option in recipe_options():
        if option.values:
            lines.append(f"            *' {option.name}') words={_listed(option.values)} first= files= ;;")
    lines += [
        "        esac",
        '        (( COMP_CWORD == place )) && words="$first $words"',
        "    fi",
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
        '    [[ -n $files && $current != -* ]] && COMPREPLY+=($(compgen -f -- "$current"))',
        "}",
        "complete -o filenames -F _megdet megdet",
    ]
    return "\n".join(lines) + "\n"


def zsh_script() -> str:
    """For zsh, which can run the completion of bash: `source <(megdet completion zsh)`."""
    return "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n" + bash_script()


def fish_script() -> str:
    """For fish: `megdet completion fish | source`."""
    lines = [
        "# completion of megdet for fish: megdet completion fish | source",
        'function __megdet_at; set -l words (commandline -opc); test "$words[2..]" = "$argv"; end',
        'function __megdet_in; set -l words (commandline -opc); string match -q -- "$argv *" "$words[2..] "; end',
        "complete -c megdet -f -n '__megdet_at' -l version",
    ]
    lines += [
        f"complete -c megdet -f -n '__megdet_at' -a {name} -d {_quoted(verb.help)}" for name, verb in VERBS.items()
    ]
    for command in commands():
        if command.first:
            no_files = " -f" if command.words in _pairs() else ""
            words = _quoted(" ".join(command.first))
            lines.append(f"complete -c megdet{no_files} -n '__megdet_at {command.words}' -a {words}")
        for option in (*command.options, *(recipe_options() if command.takes_keys else ())):
            values = (
                f" -x -a {_quoted(' '.join(option.values))}" if option.values else " -r" if option.takes_value else ""
            )
            name, text = option.name.removeprefix("--"), _quoted(option.help.replace("%%", "%"))
            lines.append(f"complete -c megdet -n '__megdet_in {command.words}' -l {name}{values} -d {text}")
    return "\n".join(lines) + "\n"


def _pairs() -> list[str]:
    """The verbs that have a second word."""
    return list(dict.fromkeys(command.words.split()[0] for command in commands() if " " in command.words))


def _listed(words: Sequence[str]) -> str:
    return shlex.quote(" ".join(words))


def _quoted(text: str) -> str:
    """A text within the single quotes of fish."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
