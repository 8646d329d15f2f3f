"""What `exact: true` costs: time and memory of a training step beside `exact: false`.

    python bench/exact.py --size 320 --batch 4

Both sides are whole steps of ResNet-50 FPN on the same images, each in a process of its own, in turn. Reported are the
seconds of a step, the processor's seconds of a step (which other programs on the machine change less), and the peak of
the process's memory less its value after the imports. Memory is measured in processes of their own, which hand freed
memory back, so that the peak is of what is in use.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch
from memory import resident_mib
from real_step import real_step
from rich.console import Console
from rich.table import Table
from sides import NUM_CLASSES, shared_recipe, start_side
from train_step import make_images

SIDES = ("exact false", "exact true")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images a step, and of a group")
    parser.add_argument("--norm", choices=["batch", "frozen"], default="batch", help="in the backbone")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side, in turn")
    parser.add_argument("--steps", type=int, default=2, help="of each process, after one that warms up")
    parser.add_argument("--side", choices=SIDES, help="measure this side alone, in this process")
    parser.add_argument("--hands-back", action="store_true", help="with --side: measure memory, not time")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measured(options)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side, own in found.items():
            time_of_it = measured_in_process(options, side)
            own.append(time_of_it | measured_in_process(options, side, hands_back=True))
    rows = {
        side: {key: statistics.median(row[key] for row in own) for key in own[0]}
        | {f"{key}_spread": [min(row[key] for row in own), max(row[key] for row in own)] for key in own[0]}
        for side, own in found.items()
    }
    plain, exact = (rows[side] for side in SIDES)
    ratios = {key: exact[key] / plain[key] for key in ("seconds", "processor_seconds", "mib")}
    if options.json:
        print(json.dumps({**vars(options), "torch": torch.__version__, "rows": rows, "ratios": ratios}))
        return
    table = Table("side", "seconds a step", "processor seconds", "peak less imports, MiB")
    for side, row in rows.items():
        table.add_row(side, f"{row['seconds']:.2f}", f"{row['processor_seconds']:.2f}", f"{row['mib']:.0f}")
    table.add_row("times as much", *(f"{ratio:.2f}" for ratio in ratios.values()))
    Console().print(table)


def measured_in_process(options: argparse.Namespace, side: str, *, hands_back: bool = False) -> dict[str, float]:
    """The times of a side, or its memory, measured in a new process."""
    command = [sys.executable, __file__, "--side", side, "--size", str(options.size), "--batch", str(options.batch)]
    command += ["--norm", options.norm, "--precision", options.precision, "--steps", str(options.steps)]
    environment = dict(os.environ)
    if hands_back:
        command += ["--hands-back"]
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(options: argparse.Namespace) -> dict[str, float]:
    """Seconds or memory of a step of one side, in this process."""
    start_side("torchvision" if options.hands_back else "megdet")
    images, boxes, labels, _ = make_images(options.size, options.batch)
    before = resident_mib("VmRSS")
    recipe = shared_recipe(options.batch, options.precision)
    if options.norm == "frozen":
        recipe = replace(recipe, bn_size=0, group_size=options.batch)
    recipe = replace(recipe, exact=options.side == "exact true")
    step = real_step(images, boxes, labels, NUM_CLASSES, recipe)
    step()
    if options.hands_back:
        step()  # the first has no momentum yet
        return {"mib": resident_mib("VmHWM") - before}
    seconds, processor = time.perf_counter(), time.process_time()
    for _ in range(options.steps):
        step()
    return {
        "seconds": (time.perf_counter() - seconds) / options.steps,
        "processor_seconds": (time.process_time() - processor) / options.steps,
    }


if __name__ == "__main__":
    main()
