"""Images a second of a small training alone and beside another on the same cores, by how long OpenMP's threads spin.

    python bench/busy_machine.py

The step is that of the demo without its data, on all cores, each training in a process of its own; they take turns, a
round a few seconds of each setting alone and then of two side by side. `torch` spins as torch does where nobody says
anything, `megdet` as MegDet sets it, the others for comparison. Beside another one the figure is the mean of both; half
of what torch's reaches alone is a fair share. Loading processes have one thread each
and wait for nobody; an evaluation beside the training inherits the setting. The machine must be calm.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from real_step import real_step
from rich.console import Console
from rich.table import Table

import megdet
from megdet.recipe_file import packaged_recipes, parse_recipe
from megdet.runtime import usable_cores

SETTINGS = {
    "torch": {"GOMP_SPINCOUNT": "300000"},
    "megdet": {"GOMP_SPINCOUNT": str(megdet.SPIN_COUNT)},
    "10000": {"GOMP_SPINCOUNT": "10000"},
    "1000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
BATCH, EDGE, BOXES, CLASSES = 16, 128, 4, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=6, help="measurements of each setting, in turn")
    parser.add_argument("--settings", default=",".join(SETTINGS), metavar="S,S", help="of " + ", ".join(SETTINGS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", action="store_true", help="train in this process for the seconds of each line read")
    options = parser.parse_args()
    if options.side:
        serve()
        return
    names = options.settings.split(",")
    pairs = {name: (started(name), started(name)) for name in names}
    alone: dict[str, list[float]] = {name: [] for name in names}
    beside: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, pair in pairs.items():
            alone[name] += trained(pair[:1], options.seconds)
        for name, pair in pairs.items():
            beside[name].append(statistics.mean(trained(pair, options.seconds)))
    for pair in pairs.values():
        for process in pair:
            process.communicate()
    result = {
        "cores": usable_cores(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "settings": {name: " ".join(f"{key}={value}" for key, value in SETTINGS[name].items()) for name in names},
        "alone": {name: statistics.median(values) for name, values in alone.items()},
        "alone_spread": {name: [min(values), max(values)] for name, values in alone.items()},
        "alone_ratio": {name: median_ratio(alone[name], alone[names[0]]) for name in names},
        "beside": {name: statistics.median(values) for name, values in beside.items()},
        "beside_spread": {name: [min(values), max(values)] for name, values in beside.items()},
    }
    if options.json:
        print(json.dumps(result))
        return
    table = Table("", "setting", "images a second alone", f"against {names[0]}", "beside another", "of a fair share")
    for name, setting in result["settings"].items():
        fair = result["beside"][name] / (result["alone"][names[0]] / 2)
        speeds = f"{result['alone'][name]:.1f}", f"{result['alone_ratio'][name]:.3f}", f"{result['beside'][name]:.1f}"
        table.add_row(name, setting, *speeds, f"{fair:.0%}")
    Console().print(table)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def started(name: str) -> subprocess.Popen[str]:
    """A training of a setting that has warmed up and waits for a line."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment = {**clean, "OMP_NUM_THREADS": str(usable_cores()), **SETTINGS[name]}
    process = subprocess.Popen(
        [sys.executable, __file__, "--side"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    _answer(process)
    return process


def trained(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[float]:
    """Images a second of trainings that go on side by side for so long."""
    for process in processes:
        assert process.stdin is not None
        print(seconds, file=process.stdin, flush=True)
    return [float(_answer(process)) for process in processes]


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a training has ended with exit code {process.wait()}: see above")
    return line


def serve() -> None:
    """Warm up and say so; train for the seconds of each line that is read and print the images a second."""
    torch.manual_seed(0)
    corners = torch.rand(BATCH, BOXES, 2) * EDGE / 2
    boxes = torch.cat([corners, corners + EDGE / 4], dim=2)
    labels = torch.randint(CLASSES, (BATCH, BOXES))
    keys = [line for line in packaged_recipes()["demo"].splitlines() if not line.startswith("batch_size:")]
    recipe = parse_recipe("\n".join([f"batch_size: {BATCH}", *keys]), "demo")
    step = real_step(torch.rand(BATCH, 3, EDGE, EDGE), boxes, labels, CLASSES, recipe)
    for _ in range(2):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        begun, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - begun) < float(line):
            step()
            count += 1
        print(count * BATCH / passed, flush=True)


if __name__ == "__main__":
    main()
