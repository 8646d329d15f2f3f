"""Images a second of a small training alone and beside another on the same cores, by how long OpenMP's threads spin.

    python bench/busy_machine.py

The step is that of the demo without its data, on all cores, each training in a process of its own. `torch` spins as
torch does where nobody says anything, `megdet` as MegDet sets it, the others for comparison. Beside another one the
figure is the mean of both; half of what it reaches alone is a fair share. The machine must be calm.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from real_step import real_step
from rich.console import Console
from rich.table import Table

import megdet
from megdet.journal.environment import usable_cores
from megdet.recipe_file import packaged_recipes

SETTINGS = {
    "torch": {"GOMP_SPINCOUNT": "300000"},
    "megdet": {"GOMP_SPINCOUNT": str(megdet.SPIN_COUNT)},
    "3000": {"GOMP_SPINCOUNT": "3000"},
    "1000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
BATCH, EDGE, BOXES, CLASSES = 16, 128, 4, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each setting, in turn")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", action="store_true", help="train in this process, when a line is read")
    options = parser.parse_args()
    if options.side:
        serve(options.seconds)
        return
    alone: dict[str, list[float]] = {name: [] for name in SETTINGS}
    beside: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(options.rounds):
        for name in SETTINGS:
            alone[name] += train_together(name, 1, options.seconds)
            beside[name].append(statistics.mean(train_together(name, 2, options.seconds)))
    result = {
        "cores": usable_cores(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "settings": {name: " ".join(f"{key}={value}" for key, value in own.items()) for name, own in SETTINGS.items()},
        "alone": {name: statistics.median(values) for name, values in alone.items()},
        "alone_spread": {name: [min(values), max(values)] for name, values in alone.items()},
        "beside": {name: statistics.median(values) for name, values in beside.items()},
        "beside_spread": {name: [min(values), max(values)] for name, values in beside.items()},
    }
    if options.json:
        print(json.dumps(result))
        return
    table = Table("", "setting", "images a second alone", "beside another", "of a fair share")
    for name, setting in result["settings"].items():
        fair = result["beside"][name] / (result["alone"]["torch"] / 2)
        table.add_row(name, setting, f"{result['alone'][name]:.1f}", f"{result['beside'][name]:.1f}", f"{fair:.0%}")
    Console().print(table)


def train_together(name: str, count: int, seconds: float) -> list[float]:
    """Images a second of so many trainings that begin at the same time."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment = {**clean, "OMP_NUM_THREADS": str(usable_cores()), **SETTINGS[name]}
    command = [sys.executable, __file__, "--side", "--seconds", str(seconds)]
    processes = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit(f"a training has ended with exit code {process.wait()}: see above")
    for process in processes:
        assert process.stdin is not None
        print(file=process.stdin, flush=True)
    return [float(process.communicate()[0]) for process in processes]


def serve(seconds: float) -> None:
    """Warm up and say so; at the first line that is read train for so long and print the images a second."""
    torch.manual_seed(0)
    corners = torch.rand(BATCH, BOXES, 2) * EDGE / 2
    boxes = torch.cat([corners, corners + EDGE / 4], dim=2)
    labels = torch.randint(CLASSES, (BATCH, BOXES))
    keys = [line for line in packaged_recipes()["demo"].splitlines() if not line.startswith("batch_size:")]
    step = real_step(torch.rand(BATCH, 3, EDGE, EDGE), boxes, labels, CLASSES, "\n".join(keys))
    for _ in range(2):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        step()
        count += 1
    print(count * BATCH / passed)


if __name__ == "__main__":
    main()
