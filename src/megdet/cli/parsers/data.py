"""The options of data demo, data check and data stats."""

from pathlib import Path

from megdet.cli.parsers.converting import add_convert, add_merge, add_sample, add_split
from megdet.cli.parsers.shared import Parser, add_advice_options, add_json
from megdet.cli.parsers.values import at_least_one
from megdet.data.far.folder import folder_of
from megdet.recipe import Data

SHOWN_OF_A_KIND = 20


def add_data(parser: Parser) -> None:
    """The verbs of `data` and their options."""
    verbs = parser.add_subparsers(metavar="VERB", required=True, dest="data_verb", parser_class=type(parser))

    demo = verbs.add_parser("demo", help="draw the demo data set", allow_abbrev=False)
    demo.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="default data/demo, or data/demo-hard")
    demo.add_argument("--hard", action="store_true", help="smaller objects, any rotation, more clutter")
    demo.set_defaults(run_verb="data:run_demo")

    check = verbs.add_parser("check", help="list every problem of a data set", allow_abbrev=False)
    _add_dataset(check)
    check.add_argument("--masks", action="store_true", help="what a detector with masks refuses is fatal too")
    check.add_argument("--all", action="store_true", help=f"print more than {SHOWN_OF_A_KIND} problems of one kind")
    check.set_defaults(run_verb="data:run_check")

    stats = verbs.add_parser(
        "stats", help="count boxes, classes, sizes and aspect ratios, and advise a recipe", allow_abbrev=False
    )
    _add_dataset(stats)
    stats.add_argument("--masks", action="store_true", help="count masks too")
    stats.add_argument("--picture", type=Path, metavar="FILE", help="draw them too (.png, .svg or .pdf)")
    add_advice_options(stats.add_argument_group("the advice at the end, which `megdet recipes new` writes as a recipe"))
    stats.set_defaults(run_verb="data:run_stats")

    more = (add_convert(verbs), add_split(verbs), add_merge(verbs), add_sample(verbs))
    for verb in (demo, check, stats, *more):
        add_json(verb)
        verb.set_defaults(takes_overrides=False)


def _add_dataset(parser: Parser) -> None:
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="COCO instances file")
    parser.add_argument("images", type=folder_of, metavar="IMAGES", help="folder of its images, or its address")
    parser.add_argument(
        "--max-pixels",
        type=at_least_one,
        default=Data.max_pixels,
        metavar="N",
        help=f"pixels of the largest image that is decoded, default {Data.max_pixels}; a recipe has data.max_pixels",
    )
    parser.add_argument(
        "--allow-outside-files",
        action="store_true",
        help="take file names that lead out of IMAGES; a recipe has data.allow_outside_files",
    )
