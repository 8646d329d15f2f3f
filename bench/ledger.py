"""What the ledger costs: the seconds of a line, beside those of the steps between two lines.

    python bench/ledger.py --size 320 --batch 2
    python bench/ledger.py --recipe demo --size 128 --batch 16

ResNet-50 FPN or the detector of a recipe, with momentum, random weights. A line has three parts: the copy of the state,
for which the training waits, the digests, and the rest (which images the steps had, their numbers, the file, flushed to
the disk). The last two are made by a thread beside the training; on a machine whose cores are all at work they take its
time all the same, so `part_of_time` counts everything: the seconds of a line over those of `ledger_steps` steps. A
checkpoint has one line more, and so have the third step after it and the start. The content of the training images is
read once a run, at the rate of `image_mib_a_second`.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from real_step import made_batches, made_trainer
from rich.console import Console
from sides import NUM_CLASSES
from train_step import make_images

from megdet.data.plan import TrainingPlan
from megdet.distributed.world import start_world
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe
from megdet.run_folder.checkpoint_files import Kind
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.ledger import Steps, append_line, digest_of_images, digest_of_numbers, sealed
from megdet.training.checkpoint_writer import CheckpointWriter
from megdet.training.ledger import digests, file_digest
from megdet.training.step import train_step
from megdet.training.trainer import Tensors

COCO = 117_266
"""Training images of COCO with a box."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="", help="name or path of a recipe; default the paper's baseline")
    parser.add_argument("--size", type=int, default=320, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images a step, in one group")
    parser.add_argument("--rounds", type=int, default=5, help="counted steps and lines, in turn")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; default: of temporary files")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"batch_size": options.batch, "bn_size": options.batch}
    recipe = load_recipe(options.recipe, sizes) if options.recipe else Recipe(**sizes)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = {**vars(options), "folder": str(options.folder or ""), **measure(recipe, options, Path(name))}
    if options.json:
        print(json.dumps(result))
        return
    parts = ", ".join(f"{part} {1e3 * result[part]:.0f} ms" for part in ("copy", "digests", "rest"))
    Console().print(
        f"{result['mib']:.0f} MiB of state: a line takes {parts}; {recipe.ledger_steps} steps take "
        f"{recipe.ledger_steps * result['step']:.0f} s, so the ledger is {result['part_of_time']:.2%} of the time; "
        f"images are read at {result['image_mib_a_second']:.0f} MiB/s"
    )


def measure(recipe: Recipe, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians of the seconds, and the parts of a line in the time of the steps between two lines."""
    images, boxes, labels, _ = make_images(options.size, options.batch)
    world, trainer = start_world(), made_trainer(recipe, NUM_CLASSES)
    batches = made_batches(images, boxes, labels, recipe)
    run = RunFolder(folder / "run").create()
    writer = CheckpointWriter(run, keep=1, saved_step=0)
    plan = TrainingPlan(np.random.default_rng(0).integers(300, 640, (COCO, 2)), recipe)
    seconds: dict[str, list[float]] = {"step": [], "copy": [], "digests": [], "rest": []}
    kept = SimpleNamespace(tensors={})
    size = 0
    for number in range(options.rounds + 1):
        started = time.perf_counter()
        result = train_step(trainer, batches, range(len(batches)), 1e-4, number, world)
        result.gradient_norm.item()
        seconds["step"].append(time.perf_counter() - started)
        started = time.perf_counter()
        writer.look_at_copy(trainer.state(), lambda copy: setattr(kept, "tensors", copy))
        seconds["copy"].append(time.perf_counter() - started)
        writer.wait()
        copy = cast(Tensors, kept.tensors)
        started = time.perf_counter()
        state = digests(copy)
        seconds["digests"].append(time.perf_counter() - started)
        started = time.perf_counter()
        size += _write_rest(run, plan, recipe, number, state, size)
        seconds["rest"].append(time.perf_counter() - started)
    writer.leave(None)
    median = {part: statistics.median(own[1:]) for part, own in seconds.items()}  # the first makes its memory
    line = median["copy"] + median["digests"] + median["rest"]
    return {
        **median,
        "spread": {part: [min(own[1:]), max(own[1:])] for part, own in seconds.items()},
        "mib": _bytes_of(copy) / 2**20,
        "ledger_steps": recipe.ledger_steps,
        "part_of_time": line / (recipe.ledger_steps * median["step"]),
        "waiting_part": median["copy"] / (recipe.ledger_steps * median["step"]),
        "image_mib_a_second": _image_speed(folder),
    }


def _write_rest(
    run: RunFolder, plan: TrainingPlan, recipe: Recipe, number: int, state: dict[str, str], size: int
) -> int:
    """The rest of a line, of steps that are not in memory yet; returns its bytes."""
    steps = range(number * recipe.ledger_steps, (number + 1) * recipe.ledger_steps)
    lines = [{"step": step, **{f"number{i}": 1 / (step + i + 1) for i in range(12)}} for step in steps]
    entry = Steps(
        line=number + 1,
        previous="",
        since=steps.start,
        step=steps.stop,
        epoch=plan.epochs_done(steps.stop),
        images=digest_of_images(plan.order_of(step).tolist() for step in steps),
        metrics=digest_of_numbers(lines),
        numbers=lines[-1],
        state=state,
    )
    line, _ = sealed(entry)
    append_line(run.ledger, line, size)
    return len(line)


def _bytes_of(tensors: dict[Kind, dict[str, torch.Tensor]]) -> int:
    return sum(tensor.nbytes for own in tensors.values() for tensor in own.values())


def _image_speed(folder: Path, images: int = 200, size: int = 160_000) -> float:
    """MiB a second at which files as large as COCO's are read from the system's memory and hashed."""
    files = [folder / f"{number}.jpg" for number in range(images)]
    for file in files:
        file.write_bytes(np.random.default_rng(0).bytes(size))
    started = time.perf_counter()
    for file in files:
        file_digest(file)
    return images * size / 2**20 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
