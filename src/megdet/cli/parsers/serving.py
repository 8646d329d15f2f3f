"""The options of serve."""

from megdet.cli.parsers.results import EXAMPLE, add_fold
from megdet.cli.parsers.shared import Parser, take_keys_of_run
from megdet.cli.parsers.values import at_least_one, positive, whole_number


def add_serve(parser: Parser) -> None:
    """The options of `serve`."""
    parser.add_argument("run", metavar="RUN", help="run folder, RUN/checkpoints/best, or an exported file")
    parser.add_argument("other", nargs="?", metavar="RUN2", help="a second one, to compare")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at, default 127.0.0.1: this machine")
    parser.add_argument("--port", type=whole_number, default=8000, help="default 8000; 0 is a free one")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which browsers reach the server, besides localhost and numeric addresses",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-mib", type=positive, default=20.0, metavar="MIB", help="largest body of a request, default 20"
    )
    limits.add_argument(
        "--seconds",
        type=positive,
        default=30.0,
        metavar="S",
        help="time limit to send a request, and again to wait for its answer, default 30",
    )
    limits.add_argument(
        "--queue", type=at_least_one, default=64, metavar="N", help="requests that may wait, default 64"
    )
    add_fold(parser)
    parser.add_argument("--device", default="", metavar="cpu|cuda", help="default: the GPU where there is one")
    take_keys_of_run(parser, EXAMPLE, "the runs' recipes")
    parser.set_defaults(run_verb="serving:run_serve")
