"""Verbs for a competition: ensemble, submit."""

from pathlib import Path

from megdet.cli.machine import join_world, num_workers
from megdet.cli.options import CONSOLE, Arguments, existing_file
from megdet.cli.pictures import print_numbers
from megdet.cli.results import fold_if_asked, overrides_here
from megdet.data.classes import category_ids_for
from megdet.data.far.folder import folder_of
from megdet.data.image_info import ImageInfo, images_to_detect, read_image_info
from megdet.data.result_rows import Detection, Id
from megdet.data.shared import once_a_host
from megdet.distributed.failures import stop_together
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import evaluate_files
from megdet.files import read_json, typed, write_result
from megdet.inference.ensemble import check_members, member_weights, merged_members, read_member
from megdet.inference.predict import detect_dataset
from megdet.inference.submission import check_submission, submission_name, write_submission
from megdet.inference.trained import load_detector, read_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_path import run_of


def run_ensemble(arguments: Arguments) -> None:
    """Merge the detections of several detectors, write them, and evaluate them if the annotations are known."""
    files = [_detections_of(path) for path in arguments.members]
    annotations = _common_annotations(arguments)
    info = None if annotations is None else read_image_info(annotations)
    members = [read_member(file, has_masks=not arguments.boxes) for file in files]
    check_members(members, info)
    found_ids = sorted({row.category_id for member in members for row in member.rows}, key=str)
    class_ids = found_ids if info is None else list(info.classes)
    by_class = None
    if arguments.class_weights is not None:
        by_class = read_json(arguments.class_weights, dict[str, list[float]])
    names: dict[Id, str] = {}
    if info is not None:
        names.update((identity, name) for identity, name in info.classes.items())
    weights = member_weights(len(members), class_ids, arguments.weights, by_class, names)
    options = arguments.given("iou", "vote_iou", "most")
    results = merged_members(members, class_ids, weights, arguments.method, **options)
    out = arguments.out / "detections.json"
    write_result(out, results)
    numbers = None
    if info is not None and info.has_annotations:
        numbers = evaluate_files(info.file, out)
        write_result(arguments.out / "evaluation.json", numbers.as_dict())
        print_numbers(numbers)
        CONSOLE.print(f"numbers     {arguments.out / 'evaluation.json'}")
    CONSOLE.print(f"detections  {out}, of {len(members)} members")
    arguments.print_json({"detections": str(out), "evaluation": None if numbers is None else numbers.as_dict()})


def _detections_of(path: Path) -> Path:
    """The file of detections: `path` itself, or the one in the run folder `path`."""
    if not path.is_dir():
        return existing_file(str(path))
    file = RunFolder(path).detections
    if not file.is_file():
        raise InputError(f"{path}: there is no {file.name} in this folder; `megdet evaluate {path}` writes it")
    return file


def _common_annotations(arguments: Arguments) -> Path | None:
    """The file of --annotations, or the one that all runs among the members were evaluated on."""
    if arguments.annotations is not None:
        return existing_file(str(arguments.annotations))
    folders = [RunFolder(path) for path in arguments.members if (path / "recipe.yaml").is_file()]
    files = {folder.path: read_recipe(folder).data.val_annotations for folder in folders}
    for folder, file in files.items():
        first = next(iter(files))
        if file != files[first]:
            raise InputError(
                f"{folder} is evaluated on {file}, {first} on {files[first]}: evaluate them on the same images, or "
                "name the common file with --annotations"
            )
    found = next(iter(files.values()), None)
    if found is not None and not Path(found).is_file():
        CONSOLE.print(
            f"no numbers: {found}, on which {next(iter(files))} was evaluated, is missing; name it with --annotations"
        )
        return None
    return None if found is None else Path(found)


def run_submit(arguments: Arguments) -> None:
    """Detect a test set, or take a file of detections, check it, and write the zip for the COCO server."""
    submission_name(arguments.alg, arguments.test_set)  # before any work
    info = read_image_info(existing_file(str(arguments.info)))
    if (arguments.run is None) == (arguments.detections is None):
        raise InputError("name a RUN and --images, or --detections")
    if arguments.detections is not None:
        if arguments.images is not None or arguments.overrides or arguments.fold:
            raise InputError("--images, --fold and keys of a recipe need the detector of a RUN, not --detections")
        _submit(arguments, info, read_json(arguments.detections, list[Detection]), str(arguments.detections))
        return
    if arguments.images is None:
        raise InputError(f"--images is missing: name the folder of the images in {info.file}")
    world = join_world(arguments)
    with stop_together(world):
        rows = _detect(arguments, info, world)
        if world.is_first:
            _submit(arguments, info, rows, f"the detections of {arguments.run}")


def _detect(arguments: Arguments, info: ImageInfo, world: World) -> list[Detection]:
    folder, step = world.on_first(lambda: run_of(arguments.run))
    overrides = overrides_here(arguments.overrides, folder, world)
    trained = load_detector(folder, world.device, overrides, step=step, world=world)
    if arguments.kind == "segm" and not trained.model.has_masks:
        raise InputError(f"{folder.path}: the detector finds no masks: submit its boxes, --kind bbox")
    fold_if_asked(arguments, trained, world)
    data = trained.recipe.data
    images = folder_of(arguments.images, data)
    dataset = once_a_host(world, lambda: images_to_detect(info, images, data))
    ids = category_ids_for(trained.class_names, dataset)
    results = detect_dataset(trained.model, trained.recipe, dataset, ids, world, workers=num_workers(arguments))
    return typed(results, list[Detection], f"the detections of {folder.path}")


def _submit(arguments: Arguments, info: ImageInfo, rows: list[Detection], place: str) -> None:
    check_submission(rows, info, arguments.kind, place)
    path = write_submission(arguments.out, rows, arguments.kind, arguments.alg, arguments.test_set)
    images = len({row.image_id for row in rows})
    CONSOLE.print(
        f"{path}: {len(rows)} detections in {images} of {len(info.file_names)} images, {path.stat().st_size / 1e6:.1f} "
        f"MB, in the server's format for {'boxes' if arguments.kind == 'bbox' else 'masks'}"
    )
    arguments.print_json({"zip": str(path), "detections": len(rows), "images": images})
