"""Peak memory of a training step beside torchvision's, each side in processes of its own, in turn.

    python bench/memory.py --size 320 --batch 2

Reported is the peak resident memory of the process less its value after the imports (on a GPU the peak of what was
allocated), same precision on both sides, recompute off. `ratio` is ours over torchvision's where the allocator hands
freed blocks back, so that the peak is of what is in use. `ratio_as_run` compares processes as users have them: ours
keeps freed blocks for the next step (`distributed/world.py`), torchvision's has the allocator's own habits.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sides import shared_recipe, start_side, training_step
from train_step import make_images

AS_RUN = " as run"
SIDES = ("torchvision", "torchvision channels_last", "megdet", f"torchvision{AS_RUN}", f"megdet{AS_RUN}")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of both sides")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, in turn")
    parser.add_argument("--side", choices=SIDES, help="measure this side alone, in this process")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.side:
        print(peak_mib(options))
        return
    peaks: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side, values in peaks.items():
            values.append(peak_of_process(options, side))
    medians = {side: statistics.median(values) for side, values in peaks.items()}
    if options.json:
        result = {
            "size": options.size,
            "batch": options.batch,
            "precision": options.precision,
            "rounds": options.rounds,
            "mib": medians,
            "spread": {side: [min(values), max(values)] for side, values in peaks.items()},
            "ratio": medians["megdet"] / medians["torchvision"],
            "ratio_as_run": medians["megdet as run"] / medians["torchvision as run"],
            "ratios": {side: median / medians["torchvision"] for side, median in medians.items()},
            "torch": torch.__version__,
        }
        print(json.dumps(result))
        return
    table = Table("side", "peak less imports, MiB", "smallest to largest", "against torchvision")
    for side, peak in medians.items():
        spread = f"{min(peaks[side]):.0f} to {max(peaks[side]):.0f}"
        table.add_row(side, f"{peak:.0f}", spread, f"{peak / medians['torchvision']:.2f}")
    Console().print(table)


def peak_of_process(options: argparse.Namespace, side: str) -> float:
    """Peak of a side in MiB, measured in a new process."""
    command = [sys.executable, __file__, "--side", side, "--size", str(options.size)]
    command += ["--batch", str(options.batch), "--precision", options.precision]
    environment = dict(os.environ)
    if not side.endswith(AS_RUN):
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)


def peak_mib(options: argparse.Namespace) -> float:
    """Peak of a few steps of one side, less what the process had after its imports."""
    start_side("megdet" if options.side == "megdet as run" else "torchvision")  # what is freed is handed back
    images, boxes, labels, device = make_images(options.size, options.batch)
    before = resident_mib("VmRSS")
    recipe = shared_recipe(options.batch, PRECISIONS[options.precision])
    name = f"{options.side.removesuffix(AS_RUN)} {options.precision}"
    step = training_step(name, recipe, images, boxes, labels)
    for _ in range(STEPS):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_mib("VmHWM") - before


def resident_mib(key: str) -> float:
    """MiB of an entry of this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


if __name__ == "__main__":
    main()
