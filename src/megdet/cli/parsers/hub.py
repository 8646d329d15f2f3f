"""The options of hub push and hub pull."""

from pathlib import Path

from megdet.cli.parsers.shared import Parser, add_json


def add_hub(parser: Parser) -> None:
    """The verbs of `hub` and their options."""
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=type(parser))

    push = verbs.add_parser("push", help="publish the weights of a run", allow_abbrev=False)
    push.add_argument("run", metavar="RUN", help="run folder, or RUN/checkpoints/best")
    push.add_argument("name", metavar="OWNER/NAME", help="repository; made if it does not exist")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.set_defaults(run_verb="hub:run_push", takes_overrides=False)

    pull = verbs.add_parser("pull", help="make a run folder from a published detector", allow_abbrev=False)
    pull.add_argument("name", metavar="OWNER/NAME", help="repository")
    pull.add_argument("--run", type=Path, metavar="FOLDER", help="default runs/NAME")
    pull.set_defaults(run_verb="hub:run_pull", takes_overrides=False)
    for verb in (push, pull):
        verb.add_argument("--revision", metavar="R", help="branch, or for pull a tag or commit too; default main")
        add_json(verb)
