"""The verb report."""

import webbrowser

from megdet.cli.options import CONSOLE, Arguments
from megdet.errors import InputError
from megdet.report.report import write_report
from megdet.report.run_page import Places


def run_report(arguments: Arguments) -> None:
    """Write the report of runs and, if asked, show it."""
    if arguments.out is not None and arguments.out.is_dir():
        raise InputError(f"--out {arguments.out} is a folder: name a file, such as {arguments.out / 'report.html'}")
    places = Places(arguments.annotations, arguments.images)
    path = write_report(arguments.runs, arguments.out, places, **arguments.given("resamples"))
    CONSOLE.print(f"report      {path}")
    arguments.print_json({"report": str(path)})
    if arguments.open and not webbrowser.open(path.absolute().as_uri()):
        CONSOLE.print("no browser was found on this machine: open the file yourself")
