"""Verbs about detections: evaluate, detect."""

import time
from functools import partial
from pathlib import Path

from megdet.cli.machine import join_world, num_workers, run_options, say
from megdet.cli.options import Arguments, existing_file
from megdet.cli.pictures import draw_files, image_files, print_evaluation, print_numbers
from megdet.distributed.failures import stop_together
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import evaluate_files
from megdet.files import write_result
from megdet.inference.fold import fold_batch_norms
from megdet.inference.predict import detect_image
from megdet.inference.trained import TrainedDetector, load_detector, precision_here
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_path import run_of, suffix_of
from megdet.studies.evaluated_run import evaluate_run
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
        arguments.print_json({"evaluation": numbers.as_dict()})
        return
    if not arguments.run:
        raise InputError("name a RUN folder, or --ground-truth and --detections")
    world = join_world(arguments)
    with stop_together(world):
        _evaluate_run(arguments, *world.on_first(lambda: run_of(arguments.run)), world)


def _evaluate_run(arguments: Arguments, folder: RunFolder, step: int | None, world: World) -> None:
    overrides = overrides_here(arguments.overrides, folder, world)
    if arguments.precise_bn is not None:
        trained = _load_precise(arguments, folder, step, world, overrides)
    else:
        trained = load_detector(folder, world.device, overrides, step=step, world=world)
    fold_if_asked(arguments, trained, world)
    out, folded = arguments.out, suffix_of(step) + "-folded" * arguments.fold
    if out is None and arguments.precise_bn is not None:
        annotations = arguments.data[0] if arguments.data else trained.recipe.data.val_annotations
        out = folder.path / "evaluations" / f"{Path(annotations).stem}-precise-bn-{arguments.precise_bn}{folded}"
    is_own = not arguments.data and not arguments.overrides and not folded
    data = None if arguments.data is None else (arguments.data[0], arguments.data[1])
    found = evaluate_run(
        trained, folder, world, data, workers=num_workers(arguments), out=out, is_own=is_own, suffix=folded
    )
    if world.is_first:
        print_evaluation(found.numbers, found.evaluation, found.detections, arguments.print_json)


def overrides_here(overrides: dict[str, str], folder: RunFolder, world: World) -> dict[str, str]:
    """The overrides, plus float32 if the run is in bfloat16 and rank 0's machine is slow at it, which is printed.

    Every rank calls this and gets the same answer, so detections do not depend on the number of ranks. A precision
    among the overrides stays.
    """
    changed, sentence = world.on_first(lambda: precision_here(folder, overrides, world.device))
    if sentence:
        say(world, sentence)
    return changed


def fold_if_asked(arguments: Arguments, trained: TrainedDetector, world: World) -> None:
    """Fold the batch norms of a detector where `--fold` is given; prints how many."""
    if arguments.fold:
        say(world, f"{fold_batch_norms(trained.model)} batch norms folded; the checkpoint keeps them")


def _load_precise(
    arguments: Arguments, folder: RunFolder, step: int | None, world: World, overrides: dict[str, str]
) -> TrainedDetector:
    started = time.perf_counter()
    with Terminal(stderr=True, quiet=not world.is_first).status("") as status:
        trained = load_precise_detector(
            folder,
            world,
            arguments.precise_bn,
            run_options(arguments),
            overrides,
            lambda done, steps: status.update(f"batch-norm statistics: {done} of {steps} mini-batches"),
            step=step,
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
    files = image_files(arguments.images)
    world = join_world(arguments)
    folder, step = run_of(arguments.run)
    trained = load_detector(folder, world.device, overrides_here(arguments.overrides, folder, world), step=step)
    fold_if_asked(arguments, trained, world)
    out = arguments.out or folder.pictures / f"detect{suffix_of(step)}"
    is_own = arguments.out is None
    draw_files(files, partial(detect_image, trained), out, arguments.score, arguments.print_json, is_own=is_own)
