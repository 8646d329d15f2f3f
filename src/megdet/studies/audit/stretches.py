"""Stretches of a run computed again: where one can begin, in what layout, and what comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import checkpoint_path, checkpoint_step, checkpoints
from megdet.run_folder.folder import RunFolder, encode_non_finite
from megdet.run_folder.ledger import OF_THE_MACHINE, Machine, Start, Steps
from megdet.runtime import num_gpus
from megdet.studies.audit.claims import Counted, other_kinds, recorded_recipe
from megdet.training.common_start import MAY_DIFFER
from megdet.training.ledger import digests, machine_of
from megdet.training.run import RunOptions, open_run
from megdet.training.step import read_results
from megdet.training.step_log import line_of_step

_HANGS_AFTER = 6 * 3600.0
_MOST_PROCESSES = 16
_NEVER_IN_EXACT = ("devices", "lane_width", "largest_share", "threads")
"""What of a machine changes no bit of an exact run."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of one start of a run, which can be computed again."""

    first: int
    """steps done before"""
    last: int
    """steps done after"""
    start: Start
    """how they were computed"""
    lines: Sequence[Start | Steps]
    """of the ledger, with the state before the first step, after the last, or between"""

    @property
    def name(self) -> str:
        """For people."""
        return f"step {self.last}" if self.last == self.first + 1 else f"steps {self.first + 1} to {self.last}"


@dataclass(frozen=True)
class Made:
    """A stretch as it was computed here."""

    machine: Machine
    numbers: Sequence[Mapping[str, Any]]
    """of each step"""
    states: Mapping[int, Mapping[str, str]]
    """after so many steps -> kind -> digest"""


def stretches_of(folder: RunFolder, counted: Counted, steps: int, recipe: Recipe) -> list[Stretch]:
    """All stretches of at most so many steps that begin at a kept checkpoint, or where the run began."""
    kept = {checkpoint_step(path) for path in checkpoints(folder)}
    if counted[0].step == 0 and all(Path(own).exists() for own in _initial_files(recipe)):
        kept.add(0)
    return [own for first in sorted(kept) if (own := _stretch_from(first, counted, steps)) is not None]


def _initial_files(recipe: Recipe) -> list[str]:
    """What a run reads before its first step."""
    return [name for name in (recipe.model.backbone.weights, recipe.start_from) if name]


def _stretch_from(first: int, counted: Counted, steps: int) -> Stretch | None:
    start: Start | None = None
    lines: list[Start | Steps] = []
    for entry in counted:
        if isinstance(entry, Start) and entry.step > first:
            break  # from there on it was computed by another start
        start = entry if isinstance(entry, Start) else start
        if first <= entry.step <= first + steps:
            lines.append(entry)
        if entry.step > first + steps:
            return None if start is None else Stretch(first, first + steps, start, lines)
    if start is None or not lines or lines[-1].step <= first:
        return None
    return Stretch(first, lines[-1].step, start, lines)


def compute(
    stretch: Stretch, folder: RunFolder, recipe: Recipe, world: World, devices: int | None, workers: int
) -> Made:
    """Compute a stretch again, in this process or these processes, or in `devices` new ones.

    Args:
        stretch: what is computed.
        folder: of the run; nothing in it is changed.
        recipe: of the folder; it says where the data are now.
        world: every rank of it calls this.
        devices: ranks to start, where `world` is alone; None = as many as it had.
        workers: processes a rank that load images.

    Raises:
        InputError: these devices cannot give the same bits, or the data are missing.
    """
    count = devices or devices_for(stretch, recipe, world)
    if devices is None and count > max(_MOST_PROCESSES, world.size):  # a ledger of somebody else may say anything
        raise InputError(f"{stretch.name} were computed on {count} devices: --devices {count} starts as many processes")
    task = folder.path, stretch, _recipe_of(folder, stretch.start, recipe), workers
    if count == world.size:
        return _made(world, *task)
    device = stretch.start.machine.device
    if device == "cuda" and num_gpus() < count:
        raise InputError(f"{stretch.name} were computed on {count} GPUs, here are {num_gpus()}")
    made: Made = run_in_ranks(_made, count, *task, timeout=_HANGS_AFTER, device=device)[0]
    return made


def devices_for(stretch: Stretch, recipe: Recipe, world: World) -> int:
    """On how many devices a stretch is computed where nothing else is asked."""
    return world.size if world.size > 1 or recipe.exact else stretch.start.machine.devices


def check_layout(stretch: Stretch, recipe: Recipe, device: str, devices: int) -> None:
    """Refuse devices that cannot give the bits of a stretch. Raises InputError."""
    there = stretch.start.machine
    if there.device != device:
        raise InputError(f"{stretch.name} were computed on {there.device}, here on {device}: --device {there.device}")
    if devices != there.devices and not recipe.exact:
        raise InputError(
            f"{stretch.name} were computed on {there.devices} device(s), not on {devices}: without exact: true "
            f"only the same layout has the same bits; choose --devices {there.devices}, or megdet replay, which "
            "compares with a tolerance"
        )


def _recipe_of(folder: RunFolder, start: Start, now: Recipe) -> Recipe:
    """The recipe that these steps were made by, with the data where they are now."""
    places = {key.removeprefix("data."): getattr(now.data, key.removeprefix("data.")) for key in MAY_DIFFER}
    recorded = recorded_recipe(folder, start)
    return replace(recorded, data=replace(recorded.data, **places))


def _made(world: World, folder: Path, stretch: Stretch, recipe: Recipe, workers: int) -> Made:
    there, threads = stretch.start.machine, torch.get_num_threads()
    check_layout(stretch, recipe, world.device.type, world.size)
    options = RunOptions(workers=workers, compile=there.compiled)
    if world.size == there.devices:
        options = replace(options, lane_width=there.lane_width, max_images_per_device=there.largest_share)
    start = checkpoint_path(RunFolder(folder), stretch.first) if stretch.first else None
    torch.set_num_threads(there.threads)
    try:
        with open_run(recipe, world, options, start=start, is_new=False) as run:
            backs, back_to = stretch.start.roll_backs, stretch.start.rolled_back_to
            run.position = replace(run.position, roll_backs=backs, rolled_back_to=back_to)
            compared = {entry.step for entry in stretch.lines}
            numbers, states = [], {stretch.first: digests(run.trainer.state())}
            for result in run.steps(stretch.first, stretch.last):
                numbers.append(line_of_step(result, read_results([result], run.trainer)[0], run.plan))
                if result.step + 1 in compared:
                    states[result.step + 1] = digests(run.trainer.state())
            machine = machine_of(run.layout, world, is_compiled=bool(run.compiled))
            return Made(machine, numbers, states)
    finally:
        torch.set_num_threads(threads)


def fault_of(stretch: Stretch, made: Made, records: Mapping[int, Mapping[str, Any]], *, exact: bool) -> str:
    """The first thing that is not what the run has, in one sentence; empty where all has the same bits.

    `records` are the lines of metrics.jsonl by their step; `exact` says that no layout changes a bit.
    """
    found = _first_difference(stretch, made, records)
    if not found:
        return ""
    ours, theirs = msgspec.to_builtins(made.machine), msgspec.to_builtins(stretch.start.machine)
    keys = [key for key in ours if ours[key] != theirs[key] and not (exact and key in _NEVER_IN_EXACT)]
    other = [f"{key.replace('_', ' ')} {theirs[key]} there, {ours[key]} here" for key in keys]
    doubt = f"; it may be rounding, as the machine differs: {', '.join(other)}" if other else ""
    return f"computed again, {found}{doubt}"


def _first_difference(stretch: Stretch, made: Made, records: Mapping[int, Mapping[str, Any]]) -> str:
    def of_state(step: int) -> str:
        for entry in stretch.lines:
            if entry.step == step and (wrong := other_kinds(entry.state, made.states[step])):
                where = f"after step {step}" if step else "before the first step"
                return f"{wrong} {where} is not that of line {entry.line}"
        return ""

    if found := of_state(stretch.first):
        return found
    for line in made.numbers:
        step = line["step"]
        here, there = encode_non_finite(line), encode_non_finite(_without_machine(records.get(step, {})))
        for key in {**here, **there}:
            if here.get(key) != there.get(key):
                return f"{key} of step {step} is {here.get(key)}, in metrics.jsonl {there.get(key)}"
        if step in made.states and (found := of_state(step)):
            return found
    return ""


def _without_machine(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in OF_THE_MACHINE}
