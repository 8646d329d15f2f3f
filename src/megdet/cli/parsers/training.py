"""The options of demo, train and import."""

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
from megdet.cli.parsers.values import number


def add_demo(parser: Parser) -> None:
    """The options of `demo`."""
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="default runs/demo")
    add_json(parser)
    add_machine_options(parser, trains=True)
    take_keys_of_run(parser, "--schedule.epochs 4", "the recipe `demo`")
    parser.set_defaults(run_verb="training:run_demo")


def add_train(parser: Parser) -> None:
    """The options of `train`."""
    add_recipe(parser)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="run folder, default runs/NAME")
    add_json(parser)
    add_layout_options(parser)
    add_machine_options(parser, trains=True)
    take_recipe_keys(parser)
    parser.set_defaults(run_verb="training:run_train")


def add_watch(parser: Parser) -> None:
    """The options of `watch`."""
    parser.add_argument("run", metavar="RUN", help="run folder; watch waits until it exists")
    parser.add_argument(
        "--once", action="store_true", help="show it once and end, as always if the output is not a terminal"
    )
    add_json(parser)
    parser.set_defaults(run_verb="watching:run_watch", takes_overrides=False)


def add_import(parser: Parser) -> None:
    """The options of `import`."""
    parser.add_argument(
        "source",
        choices=["torchvision", "detectron2"],
        help="torchvision's fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn or retinanet_resnet50_fpn, or its _v2; "
        "detectron2's R50-FPN Faster R-CNN, Mask R-CNN or RetinaNet",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="its state dict (.pth, .safetensors or .pkl)")
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="run folder to make")
    parser.add_argument(
        "--norm-eps",
        type=number,
        default=1e-5,
        metavar="EPS",
        help="0 for torchvision's COCO_V1 files (but not for a _v2) and what was fine-tuned from them (default 1e-5)",
    )
    add_json(parser)
    take_keys_of_run(parser, "--data.short_edges [640]")
    parser.set_defaults(run_verb="training:run_import")
