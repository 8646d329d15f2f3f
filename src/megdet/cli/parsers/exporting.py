"""The options of export."""

from pathlib import Path

from megdet.cli.parsers.shared import Parser, add_json, take_keys_of_run
from megdet.cli.parsers.values import at_least_one, whole_number


def add_export(parser: Parser) -> None:
    """The options of `export`."""
    parser.add_argument("run", metavar="RUN", help="run folder, or RUN/checkpoints/best")
    parser.add_argument(
        "--to",
        choices=["onnx", "torch-export"],
        default="onnx",
        help="onnx, which runs without torch (default), or a program of torch.export",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default RUN/export/RUN.onnx or .pt2")
    parser.add_argument(
        "--images",
        type=at_least_one,
        metavar="N",
        help="prove it on N validation images, evenly spread; default all",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="let convolutions and linear layers compute with 8-bit integers; default file RUN/export/RUN-int8.onnx",
    )
    parser.add_argument(
        "--calibration",
        choices=["minmax", "percentile", "entropy"],
        help="with --int8, how ranges of numbers follow from what training images bring: all of it (minmax, default), "
        "all but the outermost 0.001 %% (percentile), or what loses the least information (entropy)",
    )
    parser.add_argument(
        "--calibration-images", type=at_least_one, metavar="N", help="with --int8, training images, default 64"
    )
    parser.add_argument("--workers", type=whole_number, default=0, metavar="N", help="processes that load images")
    add_json(parser)
    take_keys_of_run(parser, "--evaluation.flip false")
    parser.set_defaults(run_verb="exporting:run_export")
