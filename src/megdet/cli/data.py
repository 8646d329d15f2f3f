"""Verbs about data sets: demo, check, stats, convert."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from megdet.cli.options import CONSOLE, Arguments, whole_number
from megdet.data.check import check_dataset
from megdet.data.coco import load_coco
from megdet.data.convert import convert_voc, convert_yolo_folder, link_images
from megdet.data.demo import draw_demo
from megdet.data.image import MAX_PIXELS
from megdet.data.stats import QUANTILES, dataset_statistics, plot_statistics
from megdet.errors import InputError

_SHOWN_OF_A_KIND = 20


def add_verbs(verbs: Any) -> None:
    """Add the parser of `data` and its own verbs."""
    data = verbs.add_parser("data", help="draw, check, describe and convert data sets", allow_abbrev=False)
    own = data.add_subparsers(metavar="VERB", required=True, dest="data_verb")

    demo = own.add_parser("demo", help="draw the demo data set", allow_abbrev=False)
    demo.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="default data/demo, or data/demo-hard")
    demo.add_argument("--hard", action="store_true", help="smaller objects, any rotation, more clutter")
    demo.set_defaults(run_verb=run_demo)

    check = own.add_parser("check", help="list every problem of a data set", allow_abbrev=False)
    _add_dataset(check)
    check.add_argument("--all", action="store_true", help=f"print more than {_SHOWN_OF_A_KIND} problems of one kind")
    check.set_defaults(run_verb=run_check)

    stats = own.add_parser("stats", help="count boxes, classes, sizes and aspect ratios", allow_abbrev=False)
    _add_dataset(stats)
    stats.add_argument("--picture", type=Path, metavar="FILE", help="draw them too (.png, .svg or .pdf)")
    stats.set_defaults(run_verb=run_stats)

    convert = own.add_parser("convert", help="turn Pascal VOC or YOLO into COCO files", allow_abbrev=False)
    convert.add_argument("--from", dest="source_format", choices=["voc", "yolo"], required=True)
    convert.add_argument("source", type=Path, metavar="SOURCE")
    convert.add_argument("out", type=Path, metavar="OUT")
    convert.add_argument("--zero-based", action="store_true", help="VOC boxes that count pixels from 0")
    convert.add_argument("--difficult-as-crowd", action="store_true", help="VOC's difficult objects become crowds")
    convert.set_defaults(run_verb=run_convert)
    for verb in (demo, check, stats, convert):
        verb.set_defaults(takes_overrides=False)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="COCO instances file")
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of its images")
    parser.add_argument(
        "--max-pixels",
        type=whole_number,
        default=MAX_PIXELS,
        metavar="N",
        help=f"pixels of the largest image that is decoded, default {MAX_PIXELS}; a recipe has data.max_pixels",
    )
    parser.add_argument(
        "--allow-outside-files",
        action="store_true",
        help="take file names that lead out of IMAGES; a recipe has data.allow_outside_files",
    )


def run_demo(arguments: Arguments) -> None:
    """Draw the demo data set where it is missing."""
    folder = arguments.folder or Path("data/demo-hard" if arguments.hard else "data/demo")
    drawn = draw_demo(folder, hard=arguments.hard)
    CONSOLE.print(f"{folder}: {'drawn' if drawn else 'complete already'}")


def run_check(arguments: Arguments) -> None:
    """Print every problem; fatal ones make the command fail."""
    problems = check_dataset(
        arguments.annotations,
        arguments.images,
        max_pixels=arguments.max_pixels,
        allow_outside_files=arguments.allow_outside_files,
    )
    shown: Counter[tuple[bool, str]] = Counter()
    for problem in problems:
        shown[problem.fatal, problem.kind] += 1
        if shown[problem.fatal, problem.kind] > _SHOWN_OF_A_KIND and not arguments.all:
            continue
        ids = [("image", problem.image_id), ("annotation", problem.annotation_id)]
        where = "".join(f", {name} {value}" for name, value in ids if value is not None)
        CONSOLE.print(f"{'fatal' if problem.fatal else 'warning'}: {problem.file}{where}: {problem.message}")
    counts = Counter((problem.fatal, problem.kind) for problem in problems)
    if counts:
        table = Table("", "problem", "count")
        for (is_fatal, kind), count in sorted(counts.items(), reverse=True):
            table.add_row("fatal" if is_fatal else "warning", kind, str(count))
        CONSOLE.print(table)
    fatal = sum(problem.fatal for problem in problems)
    if fatal:
        raise InputError(f"{arguments.annotations}: {fatal} fatal problem(s), {len(problems) - fatal} warning(s)")
    CONSOLE.print(f"{arguments.annotations}: fit to train on, {len(problems)} warning(s)")


def run_stats(arguments: Arguments) -> None:
    """Print the statistics of a data set, and draw them if asked."""
    dataset = load_coco(
        arguments.annotations,
        arguments.images,
        keep_empty=True,
        max_pixels=arguments.max_pixels,
        allow_outside_files=arguments.allow_outside_files,
    )
    stats = dataset_statistics(dataset)
    table = Table(title=str(arguments.annotations), show_header=False)
    table.add_row("images", f"{stats.num_images}, {stats.num_empty_images} of them without a box")
    table.add_row(
        "boxes", f"{stats.num_boxes}, and {stats.num_crowds} crowds, {stats.num_dropped} without area left out"
    )
    table.add_row("small, medium, large", f"{stats.num_small}, {stats.num_medium}, {stats.num_large}")
    quantiles = "quantiles " + ", ".join(f"{quantile:g}" for quantile in QUANTILES)
    for name, values in (
        ("boxes an image", stats.boxes_per_image),
        ("box size in pixels", stats.box_sizes),
        ("width over height", stats.aspect_ratios),
    ):
        table.add_row(f"{name}, {quantiles}", ", ".join(f"{value:.4g}" for value in stats.quantiles(values)))
    CONSOLE.print(table)
    classes = Table("class", "boxes")
    for name, count in stats.class_counts.items():
        classes.add_row(name, str(count))
    CONSOLE.print(classes)
    if arguments.picture is not None:
        plot_statistics(stats, arguments.picture, arguments.annotations.name)
        CONSOLE.print(f"picture {arguments.picture}")


def run_convert(arguments: Arguments) -> None:
    """Write COCO files, and link the images beside them."""
    if arguments.source_format == "voc":
        converted = convert_voc(
            arguments.source,
            arguments.out,
            zero_based=arguments.zero_based,
            difficult_as_crowd=arguments.difficult_as_crowd,
        )
    else:
        converted = convert_yolo_folder(arguments.source, arguments.out)
    table = Table("annotations", "images", "count", "boxes", "classes")
    for part in converted:
        images = link_images(part, arguments.out)
        table.add_row(
            str(part.annotations_file),
            str(images),
            str(part.num_images),
            str(part.num_boxes),
            str(len(part.class_names)),
        )
    CONSOLE.print(table)
