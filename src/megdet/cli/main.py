"""The command line: finds the verb, parses its options, turns an InputError into one line and exit code 2.

A verb's modules are imported when it is called, because torch takes seconds to load.
"""

import errno
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import NamedTuple, NoReturn

from megdet import __version__
from megdet.cli.parsers.shared import Parser
from megdet.distributed.parent import end_with_launcher
from megdet.distributed.termination import TerminationListener
from megdet.errors import InputError, StoppedError, nearest
from megdet.program import end, load_function

_PROGRAM = "megdet"
_NOTICES = tuple(int(getattr(signal, name)) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))
"""Signals that a scheduler sends. Here they end the program; a training, once started, handles them itself."""
_STOPPED = f"{_PROGRAM}: interrupted; the same command goes on from the last checkpoint, if there is one"


class Verb(NamedTuple):
    """A verb as `megdet --help` lists it."""

    help: str
    options: str
    """`module:function` of `megdet.cli.parsers`, which adds its options to a parser and names the function to run"""


VERBS = {
    "demo": Verb("draw the demo data, train on it, evaluate and draw what is found", "training:add_demo"),
    "train": Verb("train a detector, or go on with a run", "training:add_train"),
    "watch": Verb("look at a training from another terminal", "training:add_watch"),
    "describe": Verb("show how the batch of a recipe is laid out on some devices", "planning:add_describe"),
    "recipes": Verb("list the packaged recipes, print one, or write one for your images", "planning:add_recipes"),
    "import": Verb("make a run folder from weights trained elsewhere", "training:add_import"),
    "evaluate": Verb("the COCO numbers of a run or of a file", "results:add_evaluate"),
    "detect": Verb("draw what a run finds on pictures", "results:add_detect"),
    "compare": Verb("tell whether runs differ by more than noise, and where", "comparing:add_compare"),
    "report": Verb("one page of a run, or of several compared, for a browser", "comparing:add_report"),
    "export": Verb(
        "write a run as one file that runs elsewhere, and prove that it finds the same", "exporting:add_export"
    ),
    "hub": Verb("publish a run on the Hugging Face hub, or make a run folder from a published one", "hub:add_hub"),
    "serve": Verb("a page and an HTTP endpoint that detect in images", "serving:add_serve"),
    "ensemble": Verb("merge the detections of several runs", "entries:add_ensemble"),
    "submit": Verb("check detections and write the zip that the COCO server takes", "entries:add_submit"),
    "data": Verb("draw, check, describe, convert, split, merge and sample data sets", "data:add_data"),
    "analyse": Verb("measure a run: variance of gradients, sampling ratios", "science:add_analyse"),
    "lr-test": Verb("learning-rate range test; tell which rates survive with which warmup", "science:add_lr_test"),
    "plan": Verb("memory, time and communication of a run on some devices", "planning:add_plan"),
    "simulate": Verb(
        "predict the time of training on 1 to 1,024 GPUs, and the paper's own times from two of them",
        "planning:add_simulate",
    ),
    "reproduce": Verb("train the rows of a table or figure of the paper and compare", "science:add_reproduce"),
    "replay": Verb("make a step of a run again and look at it: losses, gradients, images", "science:add_replay"),
    "audit": Verb("check a run against its ledger, and compute some of its steps again", "science:add_audit"),
    "doctor": Verb("check whether this machine is fit to train, and say what to mend", "machine:add_doctor"),
    "completion": Verb("the script that lets a shell complete verbs, options and keys", "machine:add_completion"),
    "verify": Verb("prove on this machine that the result does not depend on the devices", "science:add_verify"),
    "chaos": Verb("kill a training at random times and compare it with an undisturbed one", "science:add_chaos"),
}
"""All verbs, in the order of the help."""


def make_parser(called: str | None) -> Parser:
    """The parser of all verbs; only the verb that is called gets its options."""
    parser = Parser(
        prog=_PROGRAM,
        description="Train object detectors with large mini-batches: count images, MegDet fits them to your devices.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", parser_class=Parser)
    for name, verb in VERBS.items():
        own = verbs.add_parser(name, help=verb.help, description=verb.help, allow_abbrev=False)
        if name == called:
            load_function(f"megdet.cli.parsers.{verb.options}")(own)
    return parser


def run() -> NoReturn:
    """Run the command of this process and end the process."""
    end(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done. 2: the user can mend it. 130: stopped by Ctrl-C. A training ends with 143 after SIGTERM and with 75 after
    SIGUSR1, which means: start it again.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    end_with_launcher()  # before torch is loaded, which takes seconds
    try:
        from megdet.terminal import allow_any_character  # here: an interrupt of the import is handled below

        allow_any_character()
        trains = bool(words) and words[0] in ("train", "demo")
        with TerminationListener(_NOTICES if trains else (), raises=True):
            _run(words)
    except InputError as error:
        _complain(error)
        return 2
    except StoppedError as error:
        _complain(error)
        return error.code
    except KeyboardInterrupt:
        print(_STOPPED, file=sys.stderr)
        # CPython notes an interrupt that leaves the exec of a string, as dataclasses use it, and later ends `python -m`
        # by SIGINT, whatever the exit code. A further exec clears the note.
        exec("")
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a path on the command line or in a file
            raise
        print(
            f"{_PROGRAM}: {InputError(f'{error.filename}: {error.strerror}; choose a shorter name')}", file=sys.stderr
        )
        return 2
    finally:
        if world := sys.modules.get("megdet.distributed.world"):
            world.stop_world()
    return 0


def _complain(error: BaseException) -> None:
    rank = int(os.environ.get("RANK", "0"))
    where = f"{_PROGRAM}: " if rank == 0 else f"{_PROGRAM} (rank {rank}): "
    print(f"{where}{error}", file=sys.stderr)


def _run(words: list[str]) -> None:
    called = next((word for word in words if not word.startswith("-")), None)
    if called is not None and called not in VERBS:
        raise InputError(f"no verb '{called}'{nearest(called, VERBS)}; there are {', '.join(VERBS)}")
    parser = make_parser(called)
    options, rest = parser.parse_known_args(words)
    if called is None:
        parser.print_help()
        raise InputError(f"a verb is missing: {', '.join(VERBS)}")
    from megdet.cli.options import Arguments, split_overrides

    unknown = next((word.partition("=")[0] for word in rest if word.startswith("--")), None)
    if unknown is not None and not options.takes_overrides:
        raise InputError(f"unknown option '{unknown}'; see `{_PROGRAM} {called} --help`")
    arguments = Arguments(options, split_overrides(rest))
    # with --json tables and sentences are no result, nor is what other people's packages print
    with redirect_stdout(sys.stderr) if getattr(options, "json", False) else nullcontext():
        load_function(f"megdet.cli.{options.run_verb}")(arguments)
