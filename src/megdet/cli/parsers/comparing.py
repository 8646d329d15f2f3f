"""The options of compare and report."""

from pathlib import Path

from megdet.cli.parsers.shared import Parser, add_json
from megdet.cli.parsers.values import at_least_one
from megdet.data.far.folder import folder_of


def add_compare(parser: Parser) -> None:
    """The options of `compare`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs that were evaluated")
    add_annotations(parser)
    parser.add_argument("--kind", default="bbox", choices=("bbox", "segm"), help="boxes (default) or masks")
    parser.add_argument("--resamples", type=at_least_one, metavar="N", help="draws of the images, default 1000")
    add_json(parser)
    parser.set_defaults(run_verb="comparing:run_compare", takes_overrides=False)


def add_annotations(parser: Parser) -> None:
    """Add --annotations, for verbs that need the ground truth of a run's detections."""
    parser.add_argument(
        "--annotations", type=Path, metavar="JSON", help="the validation annotations, if they are elsewhere now"
    )


def add_report(parser: Parser) -> None:
    """The options of `report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; several are compared")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write, default report.html in the first RUN")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    add_annotations(parser)
    parser.add_argument(
        "--images", type=folder_of, metavar="FOLDER", help="the validation images, if they are elsewhere now"
    )
    parser.add_argument("--resamples", type=at_least_one, metavar="N", help="draws of the images, default 1000")
    add_json(parser)
    parser.set_defaults(run_verb="reporting:run_report", takes_overrides=False)
