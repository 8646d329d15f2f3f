"""The signals sent to a run, drawn from a seed: the same each time, though not at the same instruction."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from megdet.contract.chaos.processes import Role
from megdet.contract.chaos.progress import Activity

How = Literal["SIGKILL", "SIGTERM", "SIGSTOP", "pause"]
"""SIGSTOP is permanent, and the rest of the run must end; pause is SIGSTOP and a little later SIGCONT"""
T = TypeVar("T")

_MOMENTS: dict[Activity, int] = {"loading": 3, "stepping": 6, "saving": 6, "evaluating": 5}
_ROLES: dict[Role, int] = {"rank": 10, "worker": 4, "helper": 3, "launcher": 3}
_HOWS: dict[How, int] = {"SIGKILL": 12, "SIGTERM": 4, "SIGSTOP": 2, "pause": 2}


@dataclass(frozen=True)
class Disturbance:
    """One signal, and when it is sent to whom."""

    moment: Activity
    """what the run is doing when the signal is sent"""
    role: Role
    """the role of the process that gets it; a rank if no process has the role"""
    how: How
    delay: float
    """0 to 1: how late during the activity"""
    choice: float
    """0 to 1: which of the processes with the role"""
    devices: int
    """ranks of the next start, after this"""


def disturbances(seed: int, devices: tuple[int, ...]) -> Iterator[Disturbance]:
    """An endless stream of disturbances."""
    draws = random.Random(seed)
    while True:
        moment, role, how = _drawn(draws, _MOMENTS), _drawn(draws, _ROLES), _drawn(draws, _HOWS)
        if role == "launcher" and how == "SIGSTOP":
            how = "SIGKILL"  # no process notices a stopped launcher, nor has to
        yield Disturbance(moment, role, how, draws.random(), draws.random(), draws.choice(devices))


def _drawn(draws: random.Random, weights: dict[T, int]) -> T:
    return draws.choices(list(weights), list(weights.values()))[0]
