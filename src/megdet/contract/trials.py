"""The runs of `megdet verify`: every case on the devices asked for, and the run that each must equal."""

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megdet.contract.cases import cases_of
from megdet.contract.run import Training
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.recipe_check import check_recipe

WEIGHTS_FILE = "weights.csv"
"""The table of the weights of images, in the folder of the checkpoints (`write_weights`)."""


@dataclass(frozen=True)
class Trial:
    """A run, or the halves of a stopped one, and the run that it must equal."""

    case: str
    runs: tuple[Training, ...]
    reference: tuple[Training, ...]
    is_bitwise: bool = False

    @property
    def has_other_layout(self) -> bool:
        """Whether the run is compared with a run of another layout."""
        return any(run.layout != own.layout for run in self.runs for own in self.reference)


@dataclass(frozen=True)
class LeftOut:
    """Device counts on which a case is not tried, although they were asked for."""

    case: str
    devices: tuple[int, ...]
    why: str


def trials(
    recipe: Recipe, names: Sequence[str], devices: Sequence[int], steps: int, lane_width: int | None, folder: Path
) -> list[Trial]:
    """All trials, each once; the reference of a case comes first.

    `lane_width` is forced on every number of devices, except on the first (the reference) if it does not divide that.
    Checkpoints go into `folder`. Raises InputError for an impossible recipe or layout, and if nothing would be
    compared.
    """
    first, cases = devices[0], cases_of(recipe)
    forced = first if lane_width and first % lane_width else 0

    def run(name: str, count: int, width: int | None = None, **halves: Any) -> Training:
        changed = cases[name].change(recipe)
        if cases[name].has_weights:
            changed = replace(changed, data=replace(changed.data, image_weights=str(folder / WEIGHTS_FILE)))
        check_recipe(changed, f"case {name}")
        width = width or (None if count == forced else lane_width)
        made = Training(changed, count, width, (0, steps))
        # with the chosen width, two names of one layout are one run
        return replace(made, lane_width=made.layout.lane_width, **halves)

    def of(name: str) -> Iterator[Trial]:
        case = cases[name]
        truth = (run(case.reference or name, first),)
        half = steps // 2
        if case.stops and not 0 < half < steps:
            raise InputError(f"case {name} stops half-way: ask for at least 2 steps, not {steps}")
        if case.stops == "same":
            count = max((n for n in devices if n <= max(case.devices)), default=first)
            whole = run(name, count)
            yield Trial(name, (whole,), (whole,))
            yield Trial(name, _stopped(whole, whole, half, folder / f"{name}-{count}"), (whole,), is_bitwise=True)
        elif case.stops == "moved":
            for before, after in _moves(devices):
                runs = _stopped(run(name, before), run(name, after), half, folder / f"{name}-{before}-{after}")
                yield Trial(name, runs, truth)
        elif case.lane_width:
            for count in devices:
                if count % case.lane_width == 0:
                    yield Trial(name, (run(name, count, case.lane_width),), truth)
        else:
            asked = devices if case.reference else devices[1:]
            wanted = [n for n in asked if not case.devices or n in case.devices] or list(asked[-1:])
            if not case.reference:
                yield Trial(name, truth, truth)
            for count in wanted:
                yield Trial(name, (run(name, count),), truth)

    found: dict[tuple[tuple[Training, ...], tuple[Training, ...]], Trial] = {}
    for trial in itertools.chain.from_iterable(map(of, names)):
        found.setdefault((trial.runs, trial.reference), trial)  # lane-1 may be the same runs as base
    if all(trial.runs == trial.reference for trial in found.values()):
        if widths := [cases[name].lane_width for name in names if cases[name].lane_width > 1]:
            raise InputError(
                f"nothing to compare: {', '.join(names)} on {', '.join(map(str, devices))} device(s); name one more "
                f"number of devices, a multiple of {' or of '.join(map(str, widths))}, as in --devices 1,{widths[0]}"
            )
        raise InputError(
            f"nothing to compare: {', '.join(names)} on {', '.join(map(str, devices))} device(s); "
            "name at least two device counts, as in --devices 1,2"
        )
    return list(found.values())


def write_weights(folder: Path, file_names: Sequence[str], batch_size: int) -> None:
    """Write weights from 0.5 to 3 of these images, and 0 of the first if the others are enough for a mini-batch."""
    first = 0.0 if len(file_names) > batch_size else 1.0
    weights = [first, *(0.5 + 0.5 * (place % 6) for place in range(1, len(file_names)))]
    with (folder / WEIGHTS_FILE).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "weight"), *zip(file_names, weights, strict=True)])


def left_out(recipe: Recipe, planned: Sequence[Trial], names: Sequence[str], devices: Sequence[int]) -> list[LeftOut]:
    """The cases that are not tried on every number of devices asked for, and why."""
    found = []
    for name, case in cases_of(recipe).items():
        tried = {run.ranks for trial in planned if trial.case == name for run in trial.runs}
        missing = [count for count in devices if count not in tried]
        uneven = [count for count in missing if case.lane_width and count % case.lane_width]
        even = [count for count in missing if count not in uneven]
        if name not in names:
            reasons = [(missing, "not asked for")]
        elif case.lane_width:
            reasons = [
                (uneven, f"{case.lane_width} does not divide them"),
                (even, f"the same as case {case.reference} there"),
            ]
        else:
            reasons = [(missing, "to save time")]
        found += [LeftOut(name, tuple(counts), why) for counts, why in reasons if counts]
    return found


def _moves(devices: Sequence[int]) -> list[tuple[int, int]]:
    """From the most devices to the first, and from the first to the middle one."""
    moves = [(devices[-1], devices[0]), (devices[0], devices[len(devices) // 2])]
    return [(before, after) for before, after in moves if before != after]


def _stopped(before: Training, after: Training, half: int, folder: Path) -> tuple[Training, Training]:
    steps = before.steps[1]
    return replace(before, steps=(0, half), folder=folder), replace(after, steps=(half, steps), folder=folder)
