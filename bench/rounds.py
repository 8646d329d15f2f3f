"""Sides in turn: a round calls every side once, so that a drift of the machine touches all of them alike."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def in_turn(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every counted round; one round before them warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


def summary(times: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Each side's median (`seconds`) and `spread`, and the reference's time over it (`ratios`, `ratio_spread`).

    A spread is [smallest, largest]; that of a ratio is taken round by round.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: [a / b for a, b in zip(times[reference], values, strict=True)] for name, values in times.items()}
    return {
        "seconds": medians,
        "spread": {name: [min(values), max(values)] for name, values in times.items()},
        "ratios": {name: medians[reference] / seconds for name, seconds in medians.items()},
        "ratio_spread": {name: [min(values), max(values)] for name, values in ratios.items()},
    }


class SideProcess:
    """A side in a process of its own, a script that calls `serve`; a call makes it step once.

    `environment` is that of the process, where it is not this one's.
    """

    def __init__(self, *script: str, environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=None if environment is None else dict(environment),
        )

    def __call__(self) -> None:
        """One step, waited for."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        if not self.process.stdout.readline():
            raise SystemExit(f"a side has ended with exit code {self.process.wait()}: see above")

    def end(self) -> None:
        """Let the process go."""
        self.process.communicate()


def serve(step: Callable[[], object]) -> None:
    """A step for each line on the standard input, answered by a line."""
    for _ in sys.stdin:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print("done", flush=True)
