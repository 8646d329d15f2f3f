"""`megdet audit`: first what is written, the chain and the files that it stands for, then stretches computed again."""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megdet.data.sampling.frequencies import training_plan
from megdet.distributed.world import World
from megdet.errors import InputError, shown
from megdet.evaluation.coco_numbers import Evaluation
from megdet.files import read_json
from megdet.inference.trained import read_recipe
from megdet.recipe import Recipe
from megdet.recipe_file import first_difference
from megdet.run_folder.folder import RunFolder, encode_non_finite
from megdet.run_folder.ledger import BrokenChainError, Chain, Evaluated, Images, Start, Steps, course, read_chain
from megdet.run_folder.metrics import read_metrics
from megdet.studies.audit import claims
from megdet.studies.audit.stretches import Stretch, check_layout, compute, devices_for, fault_of, stretches_of
from megdet.training.datasets import load_datasets
from megdet.training.ledger import SHORT_STRETCH, file_digest

_MEND = "set keep_checkpoints or keep_every_epochs before a training, so that steps follow a kept checkpoint"


@dataclass(frozen=True)
class Request:
    """Which run, and how much of it is computed again."""

    folder: Path
    seed: int
    """of the choice of stretches"""
    steps: int = SHORT_STRETCH
    """of a stretch, at most"""
    stretches: int = 2
    head: str = ""
    """the hash of a line that was published; empty = none"""
    overrides: Mapping[str, Any] | None = None
    """keys of the recipe that do not change the result, such as the place of the images"""


@dataclass(frozen=True)
class Again:
    """A stretch that was computed again."""

    first: int
    """steps done before"""
    last: int
    """steps done after"""
    devices: int
    states: int
    """how many states of it are in the ledger and were compared; its numbers all were"""
    fault: str
    """the first difference; empty = the same bits"""


@dataclass(frozen=True)
class Audit:
    """What was found."""

    run: str
    seed: int
    lines: int = 0
    head: str = ""
    last_step: int = 0
    """steps that the ledger knows"""
    places: tuple[int, ...] = ()
    """the steps after which a stretch can begin"""
    again: tuple[Again, ...] = ()
    faults: tuple[str, ...] = ()
    """what is not as the ledger says"""
    notes: tuple[str, ...] = ()
    is_chain_all: bool = False
    """whether nothing was to be computed again"""

    @property
    def holds(self) -> bool:
        """Whether all is as the ledger says, and some of it was computed again if that was asked."""
        return not self.faults and (bool(self.again) or self.is_chain_all)

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        if self.faults:
            more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
            return f"does not hold: {self.faults[0]}{more}"
        files = f"the {self.lines} lines of the ledger follow from each other and agree with the files of the run"
        if not self.again and not self.is_chain_all:
            return f"not shown: {files}, but no stretch can be computed again: {_MEND}"
        if not self.again:
            return f"holds, as far as it is written: {files}; nothing was computed again"
        parts = ", ".join(f"{own.first + 1} to {own.last}" for own in self.again)
        states = sum(own.states for own in self.again)
        return (
            f"holds: {files}; steps {parts} of {self.last_step}, computed again, have the same bits in every number "
            f"and in {states} states"
        )

    def as_dict(self) -> dict[str, Any]:
        """For strict JSON."""
        return {
            "run": self.run,
            "holds": self.holds,
            "verdict": self.sentence,
            "lines": self.lines,
            "head": self.head,
            "last_step": self.last_step,
            "seed": self.seed,
            "places": list(self.places),
            "computed": [vars(own) for own in self.again],
            "faults": list(self.faults),
            "notes": list(self.notes),
        }


def audit(
    request: Request,
    world: World,
    devices: int | None = None,
    workers: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Audit:
    """Check a run; nothing of it is changed. Every rank of `world` calls it and gets the same.

    Args:
        request: what is asked.
        world: this process, or the ranks that torchrun started: stretches are computed on them then.
        devices: ranks that are started for a stretch, where `world` is one process; None = as many as it had.
        workers: processes a rank that load images.
        say: prints a sentence on what is being done.

    Raises:
        InputError: there is no such run or ledger, its data are missing, or these devices cannot give its bits.
    """
    folder = RunFolder(request.folder)
    recipe = world.on_first(lambda: _recipe_of(folder, request))
    chain, fault = world.on_first(lambda: _chain_of(folder))
    if chain is None:
        return Audit(str(folder.path), request.seed, faults=(fault,))
    counted = course(chain.entries)
    known: dict[str, Any] = {
        "run": str(folder.path),
        "seed": request.seed,
        "lines": len(chain.entries),
        "head": chain.head,
        "last_step": counted[-1].step,
    }
    faults = world.on_first(lambda: tuple(_chain_faults(folder, chain, counted, request.head)))
    datasets = load_datasets(recipe, world)
    records: dict[int, dict[str, Any]] = {}
    images = next((entry for entry in reversed(chain.entries) if isinstance(entry, Images)), None)
    evaluations = sorted(claims.counted_evaluations(chain.entries), key=lambda own: own.step)
    scores: dict[int, dict[str, Any]] = {}

    def look() -> tuple[str, ...]:
        say(f"comparing {len(datasets.train)} images, metrics and checkpoints with the ledger")
        lines = read_metrics(folder.metrics)
        records.update((line["step"], line) for line in lines if "loss" in line)
        scores.update((line["step"], line["evaluation"]) for line in lines if "evaluation" in line)
        found = [*claims.recipe_faults(folder, counted, recipe), *claims.repeated_lines(folder, lines)]
        found += claims.data_faults(folder, counted, datasets.train)
        if images is not None:
            found += claims.image_faults(folder, images, datasets.train)
        if not found:
            plan = training_plan(datasets.train, recipe)
            found += claims.plan_faults(folder, counted, datasets.train, plan)
        found += claims.metrics_faults(folder, counted, records)
        found += claims.evaluation_faults(folder, evaluations, scores)
        return (*found, *claims.checkpoint_faults(folder, counted))

    faults += world.on_first(look)
    notes = world.on_first(lambda: _notes(folder, chain, counted, max(records, default=0), evaluations, scores))
    known["notes"] = tuple(notes)
    if faults or not request.stretches:
        return Audit(**known, faults=faults, is_chain_all=not request.stretches)
    possible = world.on_first(lambda: stretches_of(folder, counted, request.steps, recipe))
    known["places"] = tuple(own.first for own in possible)
    again = []
    for stretch in _chosen(possible, request, world, devices, recipe):
        say(f"computing {stretch.name} again")
        made = compute(stretch, folder, recipe, world, devices, workers)
        wrong = world.on_first(partial(fault_of, stretch, made, records, exact=recipe.exact))
        count = made.machine.devices
        again.append(Again(stretch.first, stretch.last, count, len(made.states), wrong))
        if wrong:
            break
    return Audit(**known, again=tuple(again), faults=tuple(own.fault for own in again if own.fault))


def recorded_device(folder: RunFolder) -> str:
    """The kind of device that a run was last computed on, empty where its ledger does not say."""
    chain, _ = _chain_of(folder)
    starts = [] if chain is None else [entry for entry in chain.entries if isinstance(entry, Start)]
    return starts[-1].machine.device if starts else ""


def _recipe_of(folder: RunFolder, request: Request) -> Recipe:
    own, changed = read_recipe(folder), read_recipe(folder, dict(request.overrides or {}))
    if difference := first_difference(changed, own):
        raise InputError(f"audit computes the run's own steps, and this changes them: {difference}: leave it out")
    return changed


def _chain_of(folder: RunFolder) -> tuple[Chain | None, str]:
    """The ledger, or the sentence that says where it is broken. Raises InputError where there is none."""
    if folder.path.is_dir() and not folder.ledger.exists():
        raise InputError(
            f"{folder.path} has no ledger.jsonl: it was trained with ledger_steps 0, or by an older megdet"
        )
    try:
        chain = read_chain(folder.ledger)
        if not chain.entries:
            return None, f"{folder.ledger} has no line"
        course(chain.entries)
    except BrokenChainError as error:
        return None, str(error)
    return chain, ""


def _chain_faults(folder: RunFolder, chain: Chain, counted: claims.Counted, head: str) -> list[str]:
    faults = []
    if head and head not in chain.hashes:
        faults.append(
            f"no line of {folder.ledger} has the hash {shown(head)}: lines were cut off, or it is another run"
        )
    if counted[0].step:
        faults.append(f"{folder.ledger} begins after step {counted[0].step}: what was done before is unknown")
    return faults


def _totals(folder: RunFolder) -> dict[str, Any]:
    """The numbers in evaluation.json as a line of the ledger has them; empty if the file is missing or another."""
    try:
        found = Evaluation.from_dict(read_json(folder.evaluation), str(folder.evaluation))
    except InputError:
        return {}
    totals: dict[str, Any] = encode_non_finite(found.totals())
    return totals


def _notes(
    folder: RunFolder,
    chain: Chain,
    counted: claims.Counted,
    last: int,
    evaluations: Sequence[Evaluated],
    scores: Collection[int],
) -> list[str]:
    notes = []
    starts = [entry for entry in chain.entries if isinstance(entry, Start)]
    if len(starts) > 1:
        left = sum(1 for entry in chain.entries if isinstance(entry, Start | Steps)) - len(counted)
        notes.append(f"the run was started {len(starts)} times; {left} lines are of steps that were made again")
    if chain.is_torn:
        notes.append("half a line follows the last one: the run was killed while it wrote it")
    if last > counted[-1].step:
        notes.append(f"metrics.jsonl goes on to step {last}, what is after step {counted[-1].step} is in no line yet")
    if not any(isinstance(entry, Images) for entry in chain.entries):
        notes.append("the run ended before it knew the content of all images: only those computed again are checked")
    if unknown := sorted(set(scores) - {own.step for own in evaluations}):
        notes.append(
            f"{folder.metrics.name} has evaluations that are in no line (step {', '.join(map(str, unknown))}): made at "
            "a start of their own, or added by somebody"
        )
    if evaluations and _totals(folder) != evaluations[-1].numbers:
        notes.append(
            f"{folder.evaluation.name} is not what the training found after step {evaluations[-1].step}; "
            "`megdet evaluate` writes that file too"
        )
    if evaluations and (not folder.detections.exists() or file_digest(folder.detections) != evaluations[-1].detections):
        notes.append(
            f"{folder.detections.name} is not what the training found after step {evaluations[-1].step}; "
            "`megdet evaluate` writes that file too"
        )
    return notes


def _chosen(
    possible: Sequence[Stretch], request: Request, world: World, devices: int | None, recipe: Recipe
) -> list[Stretch]:
    """Stretches drawn by the seed among those that these devices can compute, in the order of their steps.

    Raises InputError where they can compute none of those that are possible.
    """

    def check(stretch: Stretch) -> None:
        check_layout(stretch, recipe, world.device.type, devices or devices_for(stretch, recipe, world))

    def fits(stretch: Stretch) -> bool:
        try:
            check(stretch)
        except InputError:
            return False
        return True

    fitting = [stretch for stretch in possible if fits(stretch)]
    if possible and not fitting:
        check(possible[0])
    drawn = random.Random(request.seed).sample(fitting, min(request.stretches, len(fitting)))
    return sorted(drawn, key=lambda stretch: stretch.first)
