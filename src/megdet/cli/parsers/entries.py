"""The options of ensemble and submit."""

from pathlib import Path

from megdet.cli.parsers.results import EXAMPLE, add_fold
from megdet.cli.parsers.shared import Parser, add_json, add_machine_options, take_keys_of_run
from megdet.cli.parsers.values import at_least_one, fraction, numbers
from megdet.data.far.folder import folder_of


def add_ensemble(parser: Parser) -> None:
    """The options of `ensemble`."""
    parser.add_argument(
        "members",
        nargs="+",
        type=Path,
        metavar="RUN_OR_DETECTIONS",
        help="run folders that were evaluated, or files of detections in the COCO result format",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write")
    parser.add_argument(
        "--method",
        default="vote",
        choices=("vote", "nms", "soft-nms", "gaussian-soft-nms", "wbf"),
        help="vote (default): NMS, and overlapping boxes vote; nms; soft-nms, linear or Gaussian; wbf: weighted fusion",
    )
    parser.add_argument("--weights", type=numbers, metavar="W,W,...", help="weight of each member, default 1 each")
    parser.add_argument(
        "--class-weights", type=Path, metavar="JSON", help='weights for some classes: {"person": [2, 1, 1]}'
    )
    parser.add_argument(
        "--iou", type=fraction, metavar="I", help="detections that overlap more are one, default 0.5, wbf 0.55"
    )
    parser.add_argument(
        "--vote-iou", type=fraction, metavar="I", help="with vote: least overlap of a box that votes, default 0.5"
    )
    parser.add_argument("--most", type=at_least_one, metavar="N", help="detections an image, default 100")
    parser.add_argument("--boxes", action="store_true", help="merge boxes only, if some members have no masks")
    parser.add_argument(
        "--annotations", type=Path, metavar="JSON", help="COCO instances to evaluate on, default: the file of the runs"
    )
    add_json(parser)
    parser.set_defaults(run_verb="entries:run_ensemble", takes_overrides=False)


def add_submit(parser: Parser) -> None:
    """The options of `submit`."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="run folder, or RUN/checkpoints/best")
    parser.add_argument("--images", type=folder_of, metavar="FOLDER", help="the images to detect, or their address")
    parser.add_argument("--detections", type=Path, metavar="JSON", help="submit these detections instead of a RUN's")
    parser.add_argument(
        "--info",
        type=Path,
        required=True,
        metavar="JSON",
        help="the file that names the images, such as image_info_test-dev2017.json; it needs no annotations",
    )
    parser.add_argument("--alg", required=True, metavar="NAME", help="name of the algorithm, for the server")
    parser.add_argument("--test-set", default="test-dev2017", metavar="NAME", help="default test-dev2017")
    parser.add_argument("--kind", default="bbox", choices=("bbox", "segm"), help="boxes (default) or masks")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="where to write, default here")
    add_fold(parser)
    add_json(parser)
    add_machine_options(parser)
    take_keys_of_run(parser, EXAMPLE)
    parser.set_defaults(run_verb="entries:run_submit")
