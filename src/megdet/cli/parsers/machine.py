"""The options of doctor and completion."""

from pathlib import Path

from megdet.cli.parsers.shared import Parser, add_json


def add_doctor(parser: Parser) -> None:
    """The options of `doctor`."""
    parser.add_argument(
        "--data", nargs=2, metavar=("ANNOTATIONS", "IMAGES"), help="time loading on these images, not on drawn ones"
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs"), metavar="FOLDER", help="look at the disk of this folder, default runs"
    )
    add_json(parser)
    parser.set_defaults(run_verb="examining:run_doctor", takes_overrides=False)


def add_completion(parser: Parser) -> None:
    """The options of `completion`."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")
    parser.set_defaults(run_verb="completing:run_completion", takes_overrides=False)
