"""The options of data convert, data split, data merge and data sample."""

import argparse
from pathlib import Path
from typing import Any

from megdet.cli.parsers.shared import Parser
from megdet.cli.parsers.values import at_least_one, positive, whole_number
from megdet.data.far.folder import folder_of

SOURCES = ("coco", "voc", "yolo", "csv", "labelme", "cvat", "label-studio", "hf")
TARGETS = ("coco", "voc", "yolo")


def add_convert(verbs: Any) -> Parser:
    """The options of `data convert`."""
    parser: Parser = verbs.add_parser(
        "convert", help="turn the files of other tools into COCO files, or COCO into VOC or YOLO", allow_abbrev=False
    )
    parser.add_argument("--from", dest="source_format", choices=SOURCES, required=True)
    parser.add_argument("--to", choices=TARGETS, default="coco", help="voc and yolo are made from coco; default coco")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or file; with hf also a name on the hub")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--images", type=folder_of, metavar="FOLDER", help="the images, if they are not in SOURCE")
    parser.add_argument("--split", metavar="NAME", help="with --to: name of the split, default the name of the file")
    parser.add_argument("--zero-based", action="store_true", help="VOC boxes that count pixels from 0")
    parser.add_argument("--difficult-as-crowd", action="store_true", help="VOC's difficult objects become crowds")
    parser.add_argument(
        "--corners", action="store_true", help="boxes of hf are x1, y1, x2, y2, not x, y, width, height"
    )
    parser.set_defaults(run_verb="converting:run_convert")
    return parser


def add_split(verbs: Any) -> Parser:
    """The options of `data split`."""
    parser: Parser = verbs.add_parser("split", help="split a data set, every class in proportion", allow_abbrev=False)
    _add_file(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write PART.json to")
    parser.add_argument(
        "--parts",
        type=_parts,
        default="train=0.8,val=0.2",
        metavar="NAME=W,NAME=W",
        help="parts and their weights, default train=0.8,val=0.2",
    )
    parser.add_argument(
        "--group",
        default="",
        metavar="REGEX",
        help="keep images together whose file names give the same text, as with '^(patient_[0-9]+)' or '^(.*)/'",
    )
    _add_seed(parser)
    parser.set_defaults(run_verb="converting:run_split")
    return parser


def add_merge(verbs: Any) -> Parser:
    """The options of `data merge`."""
    parser: Parser = verbs.add_parser(
        "merge", help="make one data set of several, classes matched by name", allow_abbrev=False
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write annotations/all.json and images to")
    parser.add_argument(
        "--data",
        nargs=2,
        action="append",
        required=True,
        metavar=("ANNOTATIONS", "IMAGES"),
        help="a COCO instances file and its images; give it for each",
    )
    parser.set_defaults(run_verb="converting:run_merge")
    return parser


def add_sample(verbs: Any) -> Parser:
    """The options of `data sample`."""
    parser: Parser = verbs.add_parser("sample", help="draw some of the images", allow_abbrev=False)
    _add_file(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--images", type=at_least_one, metavar="N", help="how many; default all")
    parser.add_argument("--classes", default="", metavar="A,B", help="only these classes, and images that have one")
    _add_seed(parser)
    parser.set_defaults(run_verb="converting:run_sample")
    return parser


def _add_file(parser: Parser) -> None:
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="COCO instances file")


def _add_seed(parser: Parser) -> None:
    parser.add_argument("--seed", type=whole_number, default=0, metavar="N", help="another one draws others; default 0")


def _parts(text: str) -> dict[str, float]:
    """Names and weights between commas; each name is that of a file."""
    parts: dict[str, float] = {}
    for own in text.split(","):
        name, _, weight = own.partition("=")
        if not name or name != Path(name).name or name in parts or not weight:
            raise argparse.ArgumentTypeError(f"'{text}': names and weights are expected, such as train=0.8,val=0.2")
        parts[name] = positive(weight)
    if len(parts) < 2:
        raise argparse.ArgumentTypeError(f"'{text}': name two parts or more, such as train=0.8,val=0.2")
    return parts
