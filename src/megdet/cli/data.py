"""Verbs about data sets: demo, check, stats."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from megdet.cli.advising import print_advice, wishes
from megdet.cli.options import CONSOLE, Arguments
from megdet.cli.parsers.data import SHOWN_OF_A_KIND
from megdet.data.advice import advise
from megdet.data.check import check_dataset
from megdet.data.coco import load_coco
from megdet.data.demo import draw_demo
from megdet.data.stats import QUANTILES, dataset_statistics
from megdet.errors import InputError, printable, shown


def run_demo(arguments: Arguments) -> None:
    """Draw the demo data set if it is missing."""
    folder = arguments.folder or Path("data/demo-hard" if arguments.hard else "data/demo")
    drawn = draw_demo(folder, hard=arguments.hard)
    CONSOLE.print(f"{folder}: {'drawn' if drawn else 'complete already'}")
    arguments.print_json({"folder": str(folder), "drawn": drawn})


def run_check(arguments: Arguments) -> None:
    """Print every problem; fatal ones make the command fail."""
    problems = check_dataset(
        arguments.annotations,
        arguments.images,
        max_pixels=arguments.max_pixels,
        allow_outside_files=arguments.allow_outside_files,
        with_masks=arguments.masks,
    )
    printed: Counter[tuple[bool, str]] = Counter()
    for problem in problems:
        printed[problem.fatal, problem.kind] += 1
        if printed[problem.fatal, problem.kind] > SHOWN_OF_A_KIND and not arguments.all:
            continue
        ids = [("image", problem.image_id), ("annotation", problem.annotation_id)]
        where = "".join(f", {name} {shown(value)}" for name, value in ids if value is not None)
        file = printable(str(problem.file))  # a line break in it could pose as a line of ours
        CONSOLE.print(f"{'fatal' if problem.fatal else 'warning'}: {file}{where}: {problem.message}")
    counts = Counter((problem.fatal, problem.kind) for problem in problems)
    if counts:
        table = Table("", "problem", "count")
        for (is_fatal, kind), count in sorted(counts.items(), reverse=True):
            table.add_row("fatal" if is_fatal else "warning", kind, str(count))
        CONSOLE.print(table)
    fatal = sum(problem.fatal for problem in problems)
    arguments.print_json({"fatal": fatal, "problems": [{**asdict(own), "file": str(own.file)} for own in problems]})
    if fatal:
        raise InputError(f"{arguments.annotations}: {fatal} fatal problem(s), {len(problems) - fatal} warning(s)")
    CONSOLE.print(f"{arguments.annotations}: fit to train on, {len(problems)} warning(s)")


def run_stats(arguments: Arguments) -> None:
    """Print the statistics of a data set and what they advise, and draw them if asked."""
    dataset = load_coco(
        arguments.annotations,
        arguments.images,
        keep_empty=True,
        max_pixels=arguments.max_pixels,
        allow_outside_files=arguments.allow_outside_files,
        with_masks=arguments.masks,
    )
    stats = dataset_statistics(dataset)
    table = Table(title=str(arguments.annotations), show_header=False)
    table.add_row("images", f"{stats.num_images}, {stats.num_empty_images} of them without a box")
    table.add_row(
        "boxes", f"{stats.num_boxes}, and {stats.num_crowds} crowds, {stats.num_dropped} without area left out"
    )
    table.add_row("small, medium, large", f"{stats.num_small}, {stats.num_medium}, {stats.num_large}")
    if stats.mask_fractions is not None:
        table.add_row("masks", f"{len(stats.mask_fractions)} of {stats.num_boxes} boxes have one")
    quantiles = "quantiles " + ", ".join(f"{quantile:g}" for quantile in QUANTILES)
    for name, values in (
        ("boxes an image", stats.boxes_per_image),
        ("box size in pixels", stats.box_sizes),
        ("width over height", stats.aspect_ratios),
        ("mask over box area", stats.mask_fractions),
    ):
        if values is None:
            continue
        table.add_row(f"{name}, {quantiles}", ", ".join(f"{value:.4g}" for value in stats.quantiles(values)))
    CONSOLE.print(table)
    classes = Table("class", "boxes")
    for name, count in stats.class_counts.items():
        classes.add_row(printable(name), str(count))
    CONSOLE.print(classes)
    advice = advise(stats, wishes(arguments)) if stats.num_boxes else None
    if advice is not None:
        print_advice(advice)
    if arguments.picture is not None:
        from megdet.data.stats_picture import plot_statistics  # here, because few calls need it

        plot_statistics(stats, arguments.picture, arguments.annotations.name)
        CONSOLE.print(f"picture {arguments.picture}")
    arguments.print_json({**stats.as_dict(), "advice": None if advice is None else asdict(advice)})
