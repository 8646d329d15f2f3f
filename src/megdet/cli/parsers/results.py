"""The options of evaluate and detect."""

from pathlib import Path

from megdet.cli.parsers.shared import Parser, add_json, add_layout_options, add_machine_options, take_keys_of_run
from megdet.cli.parsers.values import fraction, whole_number
from megdet.data.far.folder import folder_of

EXAMPLE = "--evaluation.batch_size 4"
"""A key of a run's recipe that may be changed."""


def add_evaluate(parser: Parser) -> None:
    """The options of `evaluate`."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="run folder, RUN/checkpoints/best, or an exported file")
    parser.add_argument(
        "--data", nargs=2, metavar=("ANNOTATIONS", "IMAGES"), help="evaluate on these instead of the recipe's val data"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default RUN, or FILE_evaluation")
    parser.add_argument("--ground-truth", metavar="JSON", help="evaluate files instead: COCO instances ...")
    parser.add_argument("--detections", metavar="JSON", help="... and detections in the COCO result format")
    parser.add_argument(
        "--precise-bn",
        type=whole_number,
        metavar="IMAGES",
        help="estimate the batch-norm statistics again from N training images, rounded up to whole mini-batches",
    )
    add_fold(parser)
    add_json(parser)
    add_layout_options(parser)
    add_machine_options(parser)
    take_keys_of_run(parser, EXAMPLE)
    parser.set_defaults(run_verb="detection:run_evaluate")


def add_detect(parser: Parser) -> None:
    """The options of `detect`."""
    parser.add_argument("run", metavar="RUN", help="run folder, RUN/checkpoints/best, or an exported file")
    parser.add_argument("images", nargs="+", type=folder_of, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default RUN/pictures/detect, or FILE_detect")
    parser.add_argument(
        "--score", type=fraction, default=0.5, metavar="S", help="draw detections of at least this score, default 0.5"
    )
    add_fold(parser)
    add_json(parser)
    add_machine_options(parser)
    take_keys_of_run(parser, EXAMPLE)
    parser.set_defaults(run_verb="detection:run_detect")


def add_fold(parser: Parser) -> None:
    """The option that folds batch norms."""
    parser.add_argument(
        "--fold",
        action="store_true",
        help="fold the batch norms into the convolutions before them: faster, results differ by rounding only",
    )
