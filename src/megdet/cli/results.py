"""Verbs about detections: evaluate, detect."""

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from megdet.cli.machine import join_world, num_workers, run_options, say
from megdet.cli.options import CONSOLE, Arguments, existing_file
from megdet.data.coco import validation_set
from megdet.data.image import IMAGE_SUFFIXES
from megdet.data.shared import once_a_host
from megdet.distributed.failures import stop_together
from megdet.distributed.world import World
from megdet.errors import InputError, printable
from megdet.evaluation.coco_numbers import Evaluation, evaluate_detections, evaluate_files
from megdet.evaluation.tables import tables
from megdet.files import make_folder, write_json_atomically
from megdet.inference.fold import fold_batch_norms
from megdet.inference.predict import category_ids_for, detect_dataset, detect_image
from megdet.inference.trained import TrainedDetector, load_detector, read_recipe
from megdet.run_folder.folder import RunFolder
from megdet.runtime import slow_at
from megdet.studies.run_pictures import save_picture
from megdet.terminal import Terminal
from megdet.training.precise_statistics import load_precise_detector


def run_evaluate(arguments: Arguments) -> None:
    """Print and write the COCO numbers of a run, or print those of two files."""
    is_precise = arguments.precise_bn is not None
    if not is_precise and (arguments.lane_width is not None or arguments.max_images_per_device is not None):
        raise InputError(
            "--lane-width and --max-images-per-device are for training and for --precise-bn: leave them out"
        )
    if arguments.ground_truth or arguments.detections:
        if is_precise:
            raise InputError("--precise-bn needs the detector of a RUN: leave out --ground-truth and --detections")
        if arguments.fold:
            raise InputError("--fold needs the detector of a RUN: leave out --ground-truth and --detections")
        if not (arguments.ground_truth and arguments.detections) or arguments.run or arguments.data:
            raise InputError("files are evaluated with both --ground-truth and --detections, without a RUN")
        numbers = evaluate_files(existing_file(arguments.ground_truth), existing_file(arguments.detections))
        print_numbers(numbers)
        if arguments.out is not None:
            write_result(arguments.out / "evaluation.json", numbers.as_dict())
        return
    if not arguments.run:
        raise InputError("name a RUN folder, or --ground-truth and --detections")
    world = join_world(arguments)
    with stop_together(world):
        _evaluate_run(arguments, RunFolder(Path(arguments.run)), world)


def _evaluate_run(arguments: Arguments, folder: RunFolder, world: World) -> None:
    overrides = overrides_here(arguments.overrides, folder, world)
    if arguments.precise_bn is not None:
        trained = _load_precise(arguments, folder, world, overrides)
    else:
        trained = load_detector(folder, world.device, overrides, world=world)
    fold_if_asked(arguments, trained, world)
    annotations, images = arguments.data or (trained.recipe.data.val_annotations, trained.recipe.data.val_images)
    data = replace(trained.recipe.data, val_annotations=annotations, val_images=images)
    dataset = once_a_host(world, lambda: validation_set(data, with_masks=trained.model.has_masks))
    ids = category_ids_for(trained.class_names, dataset)
    results = detect_dataset(trained.model, trained.recipe, dataset, ids, world, workers=num_workers(arguments))
    if not world.is_first:
        return
    numbers = evaluate_detections(dataset.annotations_file, results, has_masks=trained.model.has_masks)
    out, folded = arguments.out, "-folded" if arguments.fold else ""
    if out is None and arguments.precise_bn is not None:
        out = folder.path / "evaluations" / f"{Path(annotations).stem}-precise-bn-{arguments.precise_bn}{folded}"
    if out is None:
        own = not arguments.data and not arguments.overrides and not arguments.fold
        out = folder.path if own else folder.path / "evaluations" / f"{Path(annotations).stem}{folded}"
    write_result(out / folder.detections.name, results)
    write_result(out / folder.evaluation.name, numbers.as_dict())
    print_numbers(numbers)
    CONSOLE.print(f"numbers     {out / folder.evaluation.name}\ndetections  {out / folder.detections.name}")


def overrides_here(overrides: dict[str, str], folder: RunFolder, world: World) -> dict[str, str]:
    """The overrides, plus float32 if the run is in bfloat16 and rank 0's machine is slow at it; prints that.

    Every rank calls it and gets the same, so that the detections do not depend on the number of ranks. A precision in
    the overrides stays.
    """
    figures = "" if "precision" in overrides else world.on_first(lambda: _slowness(overrides, folder, world))
    if not figures:
        return overrides
    say(world, f"In float32, since bfloat16, the run's, is slow here ({figures}); the results differ a little.")
    return {**overrides, "precision": "float32"}


def _slowness(overrides: dict[str, str], folder: RunFolder, world: World) -> str:
    return slow_at(read_recipe(folder, overrides).precision, world.device)


def fold_if_asked(arguments: Arguments, trained: TrainedDetector, world: World) -> None:
    """Fold the batch norms of a detector where `--fold` is given; prints how many."""
    if arguments.fold:
        say(world, f"{fold_batch_norms(trained.model)} batch norms folded; the checkpoint keeps them")


def _load_precise(arguments: Arguments, folder: RunFolder, world: World, overrides: dict[str, str]) -> TrainedDetector:
    started = time.perf_counter()
    with Terminal(stderr=True, quiet=not world.is_first).status("") as status:
        trained = load_precise_detector(
            folder,
            world,
            arguments.precise_bn,
            run_options(arguments),
            overrides,
            lambda done, steps: status.update(f"batch-norm statistics: {done} of {steps} mini-batches"),
        )
    steps = -(-arguments.precise_bn // trained.recipe.batch_size)
    say(
        world,
        f"batch-norm statistics of {steps * trained.recipe.batch_size} training images in "
        f"{steps * trained.recipe.groups_per_step} groups of {trained.recipe.bn_size} "
        f"({time.perf_counter() - started:.0f} s); the checkpoint keeps its own",
    )
    return trained


def run_detect(arguments: Arguments) -> None:
    """Draw detections on every picture and write them all into one JSON."""
    files = _image_files(arguments.images)
    world = join_world(arguments)
    folder = RunFolder(Path(arguments.run))
    trained = load_detector(folder, world.device, overrides_here(arguments.overrides, folder, world))
    fold_if_asked(arguments, trained, world)
    out = arguments.out or folder.pictures / "detect"
    names = dict(zip(trained.category_ids, trained.class_names, strict=True))
    found: list[tuple[Path, list[dict[str, Any]]]] = []
    unreadable: list[str] = []
    for file in files:
        try:
            pixels, results = detect_image(trained, file)
        except InputError as error:  # go on with the other pictures
            unreadable.append(str(error))
            continue
        picture = _free_name(out, file, {earlier for earlier, _ in found})
        save_picture(picture, pixels, results, trained, arguments.score)
        drawn = sum(result["score"] >= arguments.score for result in results)
        CONSOLE.print(f"{printable(str(picture))}: {drawn} of {len(results)} detections drawn")
        found.append((picture, [{**result, "category": names[result["category_id"]]} for result in results]))
    write_result(out / "detections.json", [result for _, results in found for result in results])
    CONSOLE.print(f"{out / 'detections.json'}")
    if unreadable:
        raise InputError(f"{len(unreadable)} of {len(files)} images could not be read: {'; '.join(unreadable)}")


def _free_name(out: Path, file: Path, taken: set[Path]) -> Path:
    """A free name for a file's picture: other files may have its name in other folders or with other suffixes."""
    names = itertools.chain((file.stem, file.name, f"{file.parent.name}_{file.name}"), itertools.count(2))
    paths = (out / (f"{file.stem}_{name}.png" if isinstance(name, int) else f"{name}.png") for name in names)
    return next(path for path in paths if path not in taken)


def _image_files(paths: list[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise InputError(f"{path}: no image in this folder")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"{path}: no such file or folder")
    return files


def write_result(path: Path, value: Any) -> None:
    """Write detections or numbers as JSON, making the folder."""
    make_folder(path.parent)
    write_json_atomically(path, value, indent=2 if isinstance(value, dict) else None)


def print_numbers(numbers: Evaluation) -> None:
    """The tables of an evaluation."""
    for table in tables(numbers):
        CONSOLE.print(table)
