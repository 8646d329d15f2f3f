"""The options of export."""

from pathlib import Path

from megdet.cli.parsers.shared import Parser, add_json, take_keys_of_run
from megdet.cli.parsers.values import whole_number


def add_export(parser: Parser) -> None:
    """The options of `export`."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--to",
        choices=["onnx", "torch-export"],
        default="onnx",
        help="onnx, which runs without torch (default), or a program of torch.export",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default RUN/export/RUN.onnx or .pt2")
    parser.add_argument(
        "--images", type=whole_number, metavar="N", help="prove it on the first N validation images, default all"
    )
    parser.add_argument("--workers", type=whole_number, default=0, metavar="N", help="processes that load images")
    add_json(parser)
    take_keys_of_run(parser, "--evaluation.flip false")
    parser.set_defaults(run_verb="exporting:run_export")
