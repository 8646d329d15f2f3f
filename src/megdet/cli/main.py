"""The command line: finds the verb, parses its options, turns an InputError into one line and exit code 2."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from megdet import __version__
from megdet.cli import analysing, data, planning, reproduction, results, simulation, training, verification
from megdet.cli.options import Arguments, split_overrides
from megdet.distributed.world import stop_world
from megdet.errors import InputError, nearest
from megdet.terminal import allow_any_character

Verb = Callable[[Arguments], None]

_PROGRAM = "megdet"


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are InputErrors."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage."""
        raise InputError(f"{message}; see `{self.prog} --help`")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets `run`, the function that does it."""
    parser = _Parser(
        prog=_PROGRAM,
        description="Train object detectors with large mini-batches: count images, MegDet fits them to your devices.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", parser_class=_Parser)
    for module in (training, results, data, analysing, planning, simulation, reproduction, verification):
        module.add_verbs(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for what the user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    allow_any_character()
    try:
        _run(words)
    except InputError as error:
        rank = int(os.environ.get("RANK", "0"))
        where = f"{_PROGRAM}: " if rank == 0 else f"{_PROGRAM} (rank {rank}): "
        print(f"{where}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"{_PROGRAM}: interrupted; the same command goes on from the last checkpoint, if there is one",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # of any of the words, or of a name in somebody's file
            raise
        print(
            f"{_PROGRAM}: {InputError(f'{error.filename}: {error.strerror}; choose a shorter name')}", file=sys.stderr
        )
        return 2
    finally:
        stop_world()
    return 0


def _run(words: list[str]) -> None:
    parser = make_parser()
    verbs = [name for action in parser._actions if isinstance(action.choices, dict) for name in action.choices]
    if words and not words[0].startswith("-") and words[0] not in verbs:
        raise InputError(f"no verb '{words[0]}'{nearest(words[0], verbs)}; there are {', '.join(verbs)}")
    options, rest = parser.parse_known_args(words)
    if not hasattr(options, "run_verb"):
        parser.print_help()
        raise InputError(f"a verb is missing: {', '.join(verbs)}")
    overrides = split_overrides(rest)
    if overrides and not options.takes_overrides:
        raise InputError(f"unknown option '--{next(iter(overrides))}'; see `{_PROGRAM} {words[0]} --help`")
    options.run_verb(Arguments(options, overrides))
