"""Evaluate and detect with an exported file. Nothing here may load torch."""

from megdet.cli.options import PROGRESS, Arguments
from megdet.cli.pictures import draw_files, image_files, print_evaluation
from megdet.errors import InputError
from megdet.evaluation.exported_file import evaluate_exported_file
from megdet.exported.detector import ExportedDetector

_OF_A_RUN = {
    "fold": "--fold",
    "precise_bn": "--precise-bn",
    "lane_width": "--lane-width",
    "max_images_per_device": "--max-images-per-device",
    "device": "--device",
}


def evaluate_exported(arguments: Arguments) -> None:
    """Print and write the COCO numbers of an exported file."""
    _refuse_options(arguments)
    if arguments.ground_truth or arguments.detections:
        raise InputError("files are evaluated with both --ground-truth and --detections, without an exported file")
    detector = ExportedDetector(arguments.run)
    data = None if arguments.data is None else (arguments.data[0], arguments.data[1])
    with PROGRESS.status("") as status:
        found = evaluate_exported_file(
            detector, data, arguments.out, lambda done, of: status.update(f"{done} of {of} images")
        )
    print_evaluation(found.numbers, found.evaluation, found.detections, arguments.print_json)


def detect_exported(arguments: Arguments) -> None:
    """Draw what an exported file finds on every picture."""
    _refuse_options(arguments)
    files = image_files(arguments.images)
    detector = ExportedDetector(arguments.run)
    out = arguments.out or detector.path.with_name(f"{detector.path.stem}_detect")
    draw_files(files, detector.detect_file, out, arguments.score, arguments.print_json, is_own=False)


def _refuse_options(arguments: Arguments) -> None:
    """Raise InputError for options that need the run and do not apply to an exported file."""
    for name, option in _OF_A_RUN.items():
        if getattr(arguments.options, name, None) not in (None, False, ""):
            raise InputError(f"{option} is for a RUN: leave it out, or name the run that the file was exported from")
    for key in arguments.overrides:
        raise InputError(f"--{key}: the recipe of an exported file is fixed: change the key when you export")
