"""The files of a run compared with its ledger: recipe, data, images, plan, metrics, checkpoints.

Each function yields a sentence for each thing that is not what the ledger says, and computes no step.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megdet.data.coco import CocoDataset
from megdet.data.plan import TrainingPlan
from megdet.errors import InputError
from megdet.files import read_json
from megdet.recipe import Recipe
from megdet.recipe_file import first_difference, parse_recipe
from megdet.run_folder.checkpoint_files import checkpoint_step, checkpoints, open_checkpoint
from megdet.run_folder.folder import RunFolder, encode_non_finite
from megdet.run_folder.ledger import Entry, Evaluated, Images, Start, Steps, digest_of_images, digest_of_numbers
from megdet.training.datasets import fingerprint
from megdet.training.ledger import file_digest, image_digests
from megdet.training.trainer import digest

_MOST_NAMED = 5

Counted = Sequence[Start | Steps]
"""The lines of a ledger that count (`run_folder.ledger.course`)."""


def other_kinds(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The kinds of tensors whose digests differ in two states, named; empty where all are equal."""
    return ", ".join(sorted(kind for kind in {**ours, **theirs} if ours.get(kind) != theirs.get(kind)))


def recorded_recipe(folder: RunFolder, start: Start) -> Recipe:
    """The recipe of a start of the run. Raises InputError where this version of megdet does not read it."""
    return parse_recipe(start.recipe, f"{folder.ledger} line {start.line}")


def recipe_faults(folder: RunFolder, counted: Counted, recipe: Recipe) -> Iterator[str]:
    """Whether the recipe of the folder is that of every start."""
    for start in counted:
        if isinstance(start, Start) and (difference := first_difference(recipe, recorded_recipe(folder, start))):
            yield f"{folder.recipe} is not what the run was trained by: {difference}, in line {start.line}"
            return


def data_faults(folder: RunFolder, counted: Counted, dataset: CocoDataset) -> Iterator[str]:
    """Whether names, sizes, boxes and weights of the training images are those of every start."""
    now = fingerprint(dataset)
    for start in counted:
        if isinstance(start, Start) and start.data != now:
            which = f"{dataset.annotations_file}: the training data"
            line = f"line {start.line} of {folder.ledger.name}"
            if start.num_images != len(dataset):
                yield f"{which} are {len(dataset)} images here, {start.num_images} in {line}"
            else:
                yield f"{which} have other names, sizes, boxes or weights than in {line}"
            return


def image_faults(folder: RunFolder, images: Images, dataset: CocoDataset) -> Iterator[str]:
    """Whether every training image has the content that it had."""
    if file_digest(folder.image_digests) != images.digest:
        yield f"{folder.image_digests} is not what line {images.line} of {folder.ledger.name} stands for"
        return
    there, here = read_json(folder.image_digests, dict[str, str | None]), image_digests(dataset) or {}
    changed = [name for name, own in there.items() if here.get(name) != own]
    if changed:
        more = f" and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
        names = ", ".join(changed[:_MOST_NAMED])
        kind = "image has" if len(changed) == 1 else "images have"
        yield f"{len(changed)} training {kind} another content than when the run began: {names}{more}"


def plan_faults(folder: RunFolder, counted: Counted, dataset: CocoDataset, plan: TrainingPlan) -> Iterator[str]:
    """Whether the images of the steps are those that recipe and data give."""
    ids = dataset.image_ids
    for entry in counted:
        if isinstance(entry, Steps):
            seen = ([ids[index] for index in plan.order_of(step)] for step in range(entry.since, entry.step))
            if digest_of_images(seen) != entry.images:
                yield (
                    f"line {entry.line} of {folder.ledger.name} has other images in steps {entry.since + 1} to "
                    f"{entry.step} than recipe and data give"
                )


def metrics_faults(folder: RunFolder, counted: Counted, records: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    """Whether the numbers of all steps, by their step, are those that were computed."""
    for entry in counted:
        if not isinstance(entry, Steps):
            continue
        steps = range(entry.since + 1, entry.step + 1)
        where = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        if missing := [step for step in steps if step not in records]:
            yield f"{folder.metrics} has no line of step {missing[0]}, line {entry.line} of {folder.ledger.name} has"
        elif digest_of_numbers(records[step] for step in steps) != entry.metrics:
            last = encode_non_finite(dict(records[entry.step]))
            wrong = next((key for key, value in entry.numbers.items() if last.get(key) != value), None)
            detail = "" if wrong is None else f": {wrong} of step {entry.step} is {entry.numbers[wrong]} there"
            yield f"{folder.metrics}: {where} are not what line {entry.line} of {folder.ledger.name} has{detail}"


def repeated_lines(folder: RunFolder, lines: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Whether a step or an evaluation has two lines in metrics.jsonl; a run that goes on takes its old ones out."""
    seen = set[tuple[int, bool]]()
    for line in lines:
        if "loss" in line or "evaluation" in line:
            which = line["step"], "evaluation" in line
            if which in seen:
                yield f"{folder.metrics} has two lines of {'the evaluation of ' if which[1] else ''}step {which[0]}"
            seen.add(which)


def counted_evaluations(entries: Iterable[Entry]) -> list[Evaluated]:
    """The evaluations that count: those of steps that a later start made again are left out."""
    found: dict[int, Evaluated] = {}
    for entry in entries:
        if isinstance(entry, Start):
            found = {step: own for step, own in found.items() if step <= entry.step}
        elif isinstance(entry, Evaluated):
            found[entry.step] = entry
    return list(found.values())


def evaluation_faults(
    folder: RunFolder, evaluations: Iterable[Evaluated], records: Mapping[int, Mapping[str, Any]]
) -> Iterator[str]:
    """Whether the numbers of the evaluations, by their step, are those that were found."""
    for entry in evaluations:
        here = records.get(entry.step)
        if here is None:
            yield f"{folder.metrics} has no line of the evaluation of step {entry.step}, line {entry.line} has it"
        elif encode_non_finite(dict(here)) != entry.numbers:
            yield f"{folder.metrics}: the evaluation of step {entry.step} is not what line {entry.line} has"


def checkpoint_faults(folder: RunFolder, counted: Counted) -> Iterator[str]:
    """Whether every checkpoint that is kept is what was computed."""
    of_step = {entry.step: entry for entry in counted}
    for path in checkpoints(folder):
        entry = of_step.get(checkpoint_step(path))
        if entry is None:
            yield f"{path}: no line of {folder.ledger.name} that counts is of its step"
            continue
        try:
            checkpoint = open_checkpoint(path)
            here: dict[str, str] = {kind: digest(checkpoint.tensors(kind)) for kind in checkpoint.hashes}
        except InputError as error:
            yield str(error).partition("; delete the folder")[0]
            continue
        if wrong := other_kinds(entry.state, here):
            yield f"{path}: {wrong} is not what line {entry.line} of {folder.ledger.name} has"
