"""What a checkpoint costs: how long the training waits for it, how long it takes until it is on the disk, its size.

    python bench/checkpoint.py --recipe megdet-r50 --saves 5

The detector of a recipe with momentum (and averages, if it has them), with random weights; no image is needed. The
first save also takes the memory of the copies, so it is told apart. `beside` is how much slower a matrix product is in
the main thread while a checkpoint is written: the rest of what a step may notice.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from megdet.distributed.layout import recipe_layout
from megdet.distributed.world import World, start_world
from megdet.recipe_file import load_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_state import RunState
from megdet.training.checkpoint_writer import CheckpointWriter
from megdet.training.trainer import Trainer, make_trainer

CLASSES = tuple(f"class {number}" for number in range(80))
MATRIX = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="megdet-r50")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; default: of temporary files")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    world = start_world()
    trainer = stepped_trainer(options.recipe, world)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = measure(trainer, RunFolder(Path(name) / "run").create(), options.saves, world)
    if options.json:
        print(json.dumps(result))
        return
    Console().print(
        f"{result['mib']:.0f} MiB: the training waits {result['wait_seconds']:.3f} s (the first time "
        f"{result['first_wait_seconds']:.3f} s), it is on the disk after {result['disk_seconds']:.2f} s, and meanwhile "
        f"a matrix product takes {result['beside']:.2f} times as long"
    )


def stepped_trainer(name: str, world: World) -> Trainer:
    """The trainer of a recipe after one step with gradients of nothing, so that momentum is there."""
    recipe = load_recipe(name, {"model.backbone.weights": "", "start_from": ""})
    trainer = make_trainer(recipe, CLASSES, recipe_layout(recipe, world.size), world)
    for parameter in trainer.buckets.parameters:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.buckets.zero()
    return trainer


def measure(trainer: Trainer, folder: RunFolder, saves: int, world: World) -> dict[str, float]:
    """Seconds of the wait and until the disk has it (medians after the first save), and the size."""
    writer = CheckpointWriter(folder, keep=2, saved_step=0)
    alone = statistics.median(product_seconds(world) for _ in range(20))
    waits, writes, besides = [], [], []
    for step in range(1, saves + 2):
        state = RunState(step=step, class_names=CLASSES, category_ids=tuple(range(80)), num_images=1)
        started = time.perf_counter()
        writer.save(state, trainer.state(), [])
        waits.append(time.perf_counter() - started)
        while writer.is_writing:
            besides.append(product_seconds(world))
        writer.wait()
        writes.append(time.perf_counter() - started)
    size = sum(file.stat().st_size for file in folder.checkpoints.glob(f"step_{saves + 1:08d}/*"))
    return {
        "mib": size / 2**20,
        "first_wait_seconds": waits[0],
        "wait_seconds": statistics.median(waits[1:]),
        "disk_seconds": statistics.median(writes[1:]),
        "beside": statistics.median(besides or [alone]) / alone,
    }


def product_seconds(world: World) -> float:
    """Seconds of a matrix product, with its result read."""
    matrix = torch.ones(MATRIX, MATRIX, device=world.device)
    started = time.perf_counter()
    (matrix @ matrix)[0, 0].item()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
