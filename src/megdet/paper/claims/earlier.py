"""Trainings of an earlier call, taken over from the numbers it wrote: a claim can go on on another machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megdet.errors import InputError
from megdet.files import read_json
from megdet.paper.claims.variance import Measured, keep_measured
from megdet.paper.outcome import Outcome, keep_outcome, read_outcome
from megdet.run_folder.folder import RunFolder


@dataclass(frozen=True)
class EarlierRow:
    """A row in the numbers of a claim."""

    row: str
    keys: Mapping[str, Any]
    """all keys on top of the packaged recipe"""
    seeds: list[int]
    """of the finished trainings"""
    outcomes: list[Outcome]
    """of these seeds"""
    measured: list[list[Measured]] = field(default_factory=list)
    """of these seeds, for a claim that measures"""


@dataclass(frozen=True)
class EarlierNumbers:
    """`CLAIM.json`, as far as it is taken over."""

    item: str
    rows: list[EarlierRow]


def take_over(
    file: Path, item: str, keys_of: Callable[[str], Mapping[str, Any]], names: Mapping[tuple[str, int], Path]
) -> None:
    """Write the outcomes of a file of numbers into the run folders that have none.

    Args:
        file: `CLAIM.json`, written by an earlier call, perhaps elsewhere.
        item: the claim.
        keys_of: the keys of a row, by its name, as this call would train it.
        names: the run folder of each row and seed that are taken over; others are passed over.

    Raises:
        InputError: the file is of another claim, or a row has other keys; nothing is written then.
    """
    numbers = read_json(file, EarlierNumbers)
    if numbers.item != item:
        raise InputError(f"--outcomes {file}: it holds {numbers.item}, not {item}")
    found: dict[Path, tuple[Outcome, list[Measured]]] = {}
    for own in numbers.rows:
        measured = own.measured or [[] for _ in own.seeds]
        if not len(own.seeds) == len(own.outcomes) == len(measured):
            raise InputError(
                f"--outcomes {file}: row {own.row} has {len(own.seeds)} seeds, {len(own.outcomes)} outcomes and "
                f"{len(measured)} lists of measurements: was the file changed? Give the one that `reproduce` wrote"
            )
        for seed, outcome, points in zip(own.seeds, own.outcomes, measured, strict=True):
            folder = names.get((own.row, seed))
            if folder is None:
                continue
            ours = keys_of(own.row)
            other = [key for key in sorted({*ours, *own.keys}) if ours.get(key) != own.keys.get(key)]
            if other:
                raise InputError(
                    f"--outcomes {file}: row {own.row} was trained with {other[0]} {own.keys.get(other[0])}, this call "
                    f"has {ours.get(other[0])}: rows would not compare"
                )
            found[folder] = outcome, points
    for folder, (outcome, points) in found.items():
        if read_outcome(RunFolder(folder)) is None:
            keep_outcome(RunFolder(folder).create(), outcome)
            keep_measured(RunFolder(folder), points)
