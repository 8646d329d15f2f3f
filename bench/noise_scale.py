"""What measuring the gradient noise scale costs: a step of `megdet train` that measures beside one that does not.

    python bench/noise_scale.py --size 320 --batch 4 --bn 2

ResNet-50 FPN, random weights, SGD; the two step in turn, in one process, on the same images. Prints the median seconds
of a step, `ratio`, the measured step's time over the plain one's, and the part of the time that it is every 50 steps.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace

import torch
from real_step import real_step
from rich.console import Console
from rich.table import Table
from rounds import in_turn, summary
from sides import NUM_CLASSES
from train_step import make_images

from megdet.recipe import Recipe

PLAIN, MEASURED = "plain", "measured"
INTERVAL = 50  # of the packaged recipes of COCO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images a step")
    parser.add_argument("--bn", type=int, default=2, help="BN size in images; a group is a micro-batch")
    parser.add_argument("--rounds", type=int, default=9, help="counted steps of each side, in turn")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    sides = {
        name: make_step(options.size, options.batch, options.bn, interval)
        for name, interval in ((PLAIN, 0), (MEASURED, 1))
    }
    figures = summary(in_turn(sides, options.rounds), MEASURED)
    ratio = figures["ratios"][PLAIN]
    result = {
        "size": options.size,
        "batch": options.batch,
        "bn": options.bn,
        "rounds": options.rounds,
        "ratio": ratio,
        "interval": INTERVAL,
        "part_of_time": (ratio - 1) / INTERVAL,
        **figures,
    }
    if options.json:
        print(json.dumps(result))
        return
    table = Table("step", "seconds", "over the plain one")
    for name, seconds in figures["seconds"].items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / figures['seconds'][PLAIN]:.3f}")
    console = Console()
    console.print(table)
    console.print(f"measured every {INTERVAL} steps: {result['part_of_time']:.2%} of the time")


def make_step(size: int, batch: int, bn_size: int, interval: int) -> Callable[[], object]:
    """The step of training with a measurement every `interval` steps, 0 for none."""
    images, boxes, labels, _ = make_images(size, batch)
    recipe = replace(Recipe(), batch_size=batch, bn_size=bn_size, noise_interval=interval)
    return real_step(images, boxes, labels, NUM_CLASSES, recipe)


if __name__ == "__main__":
    main()
