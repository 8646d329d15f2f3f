"""Evaluate and detect with an exported file. Nothing here may load torch."""

from dataclasses import replace
from pathlib import Path

from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.cli.pictures import draw_files, image_files, print_numbers
from megdet.data.coco import validation_set
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import evaluate_detections
from megdet.exported.detector import ExportedDetector
from megdet.files import write_result

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
    data = detector.recipe.data
    if arguments.data:
        data = replace(data, val_annotations=arguments.data[0], val_images=arguments.data[1])
    dataset = validation_set(data, with_masks=detector.has_masks)
    with PROGRESS.status("") as status:
        rows = detector.detect_dataset(dataset, lambda done: status.update(f"{done} of {len(dataset)} images"))
    numbers = evaluate_detections(dataset.annotations_file, rows, has_masks=detector.has_masks)
    out = arguments.out or _beside(detector.path, "evaluation")
    write_result(out / "detections.json", rows)
    write_result(out / "evaluation.json", numbers.as_dict())
    print_numbers(numbers)
    CONSOLE.print(f"numbers     {out / 'evaluation.json'}\ndetections  {out / 'detections.json'}")
    files = {"numbers": str(out / "evaluation.json"), "detections": str(out / "detections.json")}
    arguments.print_json({**files, "evaluation": numbers.as_dict()})


def detect_exported(arguments: Arguments) -> None:
    """Draw what an exported file finds on every picture."""
    _refuse_options(arguments)
    files = image_files(arguments.images)
    detector = ExportedDetector(arguments.run)
    out = arguments.out or _beside(detector.path, "detect")
    draw_files(files, detector.detect_file, out, arguments.score, arguments.print_json)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.stem}_{what}")


def _refuse_options(arguments: Arguments) -> None:
    """Raise InputError for options that need the run and do not apply to an exported file."""
    for name, option in _OF_A_RUN.items():
        if getattr(arguments.options, name, None) not in (None, False, ""):
            raise InputError(f"{option} is for a RUN: leave it out, or name the run that the file was exported from")
    for key in arguments.overrides:
        raise InputError(f"--{key}: the recipe of an exported file is fixed: change the key when you export")
