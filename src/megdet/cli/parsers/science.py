"""The options of analyse, lr-test, reproduce, verify, replay, audit and chaos."""

import argparse
from pathlib import Path

from megdet.cli.parsers.shared import (
    Parser,
    add_json,
    add_layout_options,
    add_machine_options,
    add_recipe,
    take_keys_of_run,
    take_recipe_keys,
)
from megdet.cli.parsers.values import at_least_one, whole_number, whole_numbers


def add_analyse(parser: Parser) -> None:
    """The verbs of `analyse` and their options."""
    parts = parser.add_subparsers(metavar="WHAT", required=True, parser_class=type(parser))
    _add_variance(
        parts.add_parser(
            "variance", help="variance of the gradient of N and of kN images (Sec. 3.2, Eq. 2-4)", allow_abbrev=False
        )
    )
    _add_sampling(
        parts.add_parser(
            "sampling", help="Table 1 of runs, and images with their proposals (Figure 2)", allow_abbrev=False
        )
    )


def _add_variance(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--batch", type=whole_number, metavar="N", help="images of the smallest mini-batch, default the recipe's"
    )
    parser.add_argument(
        "--factors", type=whole_numbers, metavar="K,K", help="mini-batches of k x N images, default 1,2,4,8"
    )
    parser.add_argument(
        "--images", type=whole_number, metavar="M", help="use at most M images; default 8 of the largest mini-batches"
    )
    parser.add_argument(
        "--rate", type=float, metavar="R", help="rate of the small updates, default that of N images after warmup"
    )
    parser.add_argument(
        "--step", type=at_least_one, metavar="N", help="measure at the checkpoint after this step, default the newest"
    )
    _add_output(parser, "RUN/analysis/variance; required if keys of the recipe are changed")
    add_machine_options(parser)
    take_keys_of_run(parser, "--optimizer.clip_norm 0")
    parser.set_defaults(run_verb="analysing:run_variance")


def _add_sampling(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--epochs", type=whole_numbers, metavar="E,E", help="default 1,6,12, or first, middle and last of shorter runs"
    )
    parser.add_argument(
        "--images", type=whole_number, metavar="M", help="images to choose Figure 2 from, default one mini-batch"
    )
    _add_output(parser, "analysis/sampling in each RUN")
    add_machine_options(parser)
    parser.set_defaults(run_verb="analysing:run_sampling", takes_overrides=False)


def _add_output(parser: Parser, default: str) -> None:
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"where to write, default {default}")
    add_json(parser)


def add_lr_test(parser: Parser) -> None:
    """The options of `lr-test`."""
    add_recipe(parser)
    parser.add_argument("--from", dest="lowest", type=float, default=1e-4, metavar="RATE", help="default 1e-4")
    parser.add_argument("--to", dest="highest", type=float, default=1.0, metavar="RATE", help="default 1")
    parser.add_argument(
        "--steps", type=whole_number, default=100, metavar="N", help="steps of the range test, default 100"
    )
    parser.add_argument(
        "--rates", type=_rates, metavar="RATE,RATE", help="stability runs; default the recipe's and the recommended one"
    )
    parser.add_argument(
        "--warmup",
        type=whole_numbers,
        metavar="N,N",
        help="warmup steps of the stability runs; default 0 and the recipe's",
    )
    parser.add_argument(
        "--after", type=whole_number, metavar="N", help="steps at the full rate of a stability run, default 50"
    )
    _add_output(parser, "runs/lr-test/NAME")
    add_layout_options(parser)
    add_machine_options(parser)
    take_recipe_keys(parser)
    parser.set_defaults(run_verb="analysing:run_lr_test")


def add_reproduce(parser: Parser) -> None:
    """The options of `reproduce`."""
    from megdet.paper.rows import CLAIM_ITEMS, ENTRY_ITEMS, SCALES, SWEPT_ITEMS

    items = [*sorted((*SWEPT_ITEMS, *ENTRY_ITEMS), key=lambda item: (item[0] == "f", item)), *CLAIM_ITEMS]
    parser.add_argument("item", choices=items, metavar="ITEM", help=", ".join(items))
    parser.add_argument(
        "--scale",
        choices=SCALES,
        metavar="SCALE",
        help="demo: drawn shapes; bccd: blood cells; coco: the paper's own recipes; default demo, real-photos bccd",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the scale's images, default data/SCALE")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="ImageNet weights: MobileNetV2 (bccd; demo trains its own if none are given), ResNet-50 (coco)",
    )
    parser.add_argument("--rows", metavar="NAME,NAME", help="train only these rows, such as b16-bn0,b256-bn16-long")
    parser.add_argument(
        "--seeds",
        type=whole_number,
        metavar="N",
        help="trainings of each row; default 1, of table4 and figure5 3, of a claim what it asks for",
    )
    parser.add_argument(
        "--jobs", type=whole_number, default=1, metavar="N", help="train so many rows side by side, a core each"
    )
    parser.add_argument(
        "--outcomes",
        type=Path,
        metavar="FILE",
        help="of a claim: CLAIM.json of an earlier call, also of another machine; its trainings are not made again",
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="FOLDER",
        help="folder of all rows and files, default runs/reproduce/SCALE, of a claim runs/reproduce/CLAIM",
    )
    add_json(parser)
    add_layout_options(parser)
    add_machine_options(parser, trains=True)
    take_keys_of_run(parser, "--optimizer.clip_norm 4", "every row's recipe")
    parser.set_defaults(run_verb="reproduction:run_reproduce")


def add_verify(parser: Parser) -> None:
    """The options of `verify`."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="default verify, with all cases")
    parser.add_argument(
        "--devices",
        type=_device_counts,
        metavar="N,N",
        help="numbers of devices; each is compared with the first, default 1,2,3,4,8",
    )
    parser.add_argument("--lane-width", type=whole_number, metavar="K", help="force the ranks that carry one group")
    parser.add_argument(
        "--dtype",
        choices=["float64", "float32", "bfloat16"],
        help="default float64; with --exact float32, then bfloat16",
    )
    parser.add_argument("--exact", action="store_true", help="train with exact: true and allow no difference in a bit")
    parser.add_argument("--steps", type=whole_number, metavar="N", help="steps of a run, default 20")
    parser.add_argument(
        "--cases",
        metavar="NAME,NAME",
        help="all, short, or names of cases (a wrong name lists them); default all, or base if a RECIPE is named",
    )
    add_json(parser)
    take_recipe_keys(parser)
    parser.set_defaults(run_verb="verification:run_verify")


def add_replay(parser: Parser) -> None:
    """The options of `replay`."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--step", type=at_least_one, required=True, metavar="N", help="the step, as in metrics.jsonl")
    parser.add_argument("--image", metavar="K", help="show only the image with this id")
    parser.add_argument("--without", metavar="K", help="make the step without the image with this id")
    parser.add_argument(
        "--devices", type=at_least_one, default=1, metavar="W", help="ranks, each a process of its own; default 1"
    )
    parser.add_argument(
        "--roll-backs",
        type=whole_number,
        metavar="R",
        help="the step as made after R roll-backs of the run (watch.action roll_back); default: as made last",
    )
    _add_output(parser, "RUN/replay/step_N")
    add_layout_options(parser)
    add_machine_options(parser)
    take_keys_of_run(parser, "--data.train_images FOLDER")
    parser.set_defaults(run_verb="replaying:run_replay")


def add_audit(parser: Parser) -> None:
    """The options of `audit`."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--steps", type=at_least_one, metavar="K", help="computed again in a stretch, default 3")
    parser.add_argument(
        "--stretches", type=whole_number, metavar="N", help="of steps, drawn by chance, default 2; 0 = read files only"
    )
    parser.add_argument("--seed", type=whole_number, metavar="S", help="of that draw, default a new one every time")
    parser.add_argument("--head", default="", metavar="HASH", help="of the ledger, as it was published")
    parser.add_argument(
        "--devices", type=at_least_one, metavar="W", help="ranks, each a process of its own; default as the run had"
    )
    add_json(parser)
    add_machine_options(parser)
    take_keys_of_run(parser, "--data.train_images FOLDER")
    parser.set_defaults(run_verb="auditing:run_audit")


def add_chaos(parser: Parser) -> None:
    """The options of `chaos`."""
    add_recipe(parser)
    parser.add_argument("--kills", type=at_least_one, metavar="N", help="signals to send, default 50")
    parser.add_argument(
        "--devices",
        type=_device_counts,
        metavar="N,N",
        help="number of ranks, default 2; of several the first for the undisturbed run, any at each start, in float64",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="train with exact: true, in the recipe's precision: the same SHA-256 on changing numbers of ranks too",
    )
    parser.add_argument(
        "--seed", type=whole_number, metavar="S", help="seed of what is killed, when and how, default 0"
    )
    add_json(parser)
    add_machine_options(parser, trains=True, minutes_waited="0.5")
    take_recipe_keys(parser)
    parser.set_defaults(run_verb="disturbing:run_chaos")


def _rates(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of rates") from None


def _device_counts(text: str) -> tuple[int, ...]:
    """Numbers of at least 1 between commas."""
    counts = whole_numbers(text)
    if 0 in counts:
        raise argparse.ArgumentTypeError(f"'{text}' names no devices")
    return counts
