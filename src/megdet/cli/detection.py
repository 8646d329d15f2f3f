"""The verbs evaluate and detect, for a run (needs torch) or for an exported file (does not load torch)."""

from megdet.cli.options import Arguments
from megdet.exported.programs import is_exported
from megdet.program import load_function


def run_evaluate(arguments: Arguments) -> None:
    """Print and write the COCO numbers of a run, of an exported file, or of two files."""
    exported = is_exported(arguments.run)
    load_function("megdet.cli.exported:evaluate_exported" if exported else "megdet.cli.results:run_evaluate")(arguments)


def run_detect(arguments: Arguments) -> None:
    """Draw detections on every picture and write them all into one JSON."""
    exported = is_exported(arguments.run)
    load_function("megdet.cli.exported:detect_exported" if exported else "megdet.cli.results:run_detect")(arguments)
