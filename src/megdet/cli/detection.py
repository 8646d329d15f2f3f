"""The verbs evaluate and detect, for a run (needs torch) or for an exported file (does not load torch)."""

from megdet.cli.options import Arguments
from megdet.exported.programs import is_exported


def run_evaluate(arguments: Arguments) -> None:
    """Print and write the COCO numbers of a run, of an exported file, or of two files."""
    if is_exported(arguments.run):
        from megdet.cli.exported import evaluate_exported

        evaluate_exported(arguments)
    else:
        from megdet.cli.results import run_evaluate as evaluate_with_torch

        evaluate_with_torch(arguments)


def run_detect(arguments: Arguments) -> None:
    """Draw detections on every picture and write them all into one JSON."""
    if is_exported(arguments.run):
        from megdet.cli.exported import detect_exported

        detect_exported(arguments)
    else:
        from megdet.cli.results import run_detect as detect_with_torch

        detect_with_torch(arguments)
