"""The process that `measuring` starts: it makes steps of micro-batches of one size and says what they took.

Everything goes the way of a run: `make_trainer`, `train_step`, the memory habits of `start_world`. The learning rate is
so small that the weights stay where they are, and every step has the same work.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megdet.analysis import run_pictures as run_pictures  # a run draws in the end: what that loads is in its memory
from megdet.data.annotations import AnnotationTable
from megdet.data.coco import CocoDataset
from megdet.distributed.layout import recipe_layout
from megdet.distributed.world import World, start_world
from megdet.errors import InputError
from megdet.files import write_json_atomically
from megdet.inference.predict import detect_batch
from megdet.recipe import Recipe
from megdet.recipe_file import parse_recipe
from megdet.structures import Batch, Targets
from megdet.training.prepare import make_trainer
from megdet.training.step import Trainer, train_step

_RATE = 1e-9
TIMED_SECONDS = 20.0
"""Timed steps of one kind go on for so long, ..."""
TIMED_STEPS = 5
"""... and no more than so many, one at least."""
_GO_SECONDS = 0.02
_CONTEXT_BYTES = 1 << 30
"""As much of a GPU as a process may hold before it computes: a CUDA context usually takes less."""


@dataclass(frozen=True)
class Task:
    """What the process is told."""

    recipe: str
    """YAML"""
    num_classes: int
    images: int
    """of a micro-batch"""
    device: str
    threads: int
    """0 = as torch chooses"""
    batches: str
    """file of the Batches typical, largest and, where the evaluation is measured too, evaluation"""
    out: str
    """file for the answer; beside it are .ready and .go, where processes start together"""
    waits: bool
    timed_steps: int = TIMED_STEPS


def resident_bytes(key: str) -> int | None:
    """VmRSS or VmHWM (its peak) of this process, None on a system that does not tell it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def micro_batch_recipe(recipe: Recipe, images: int) -> Recipe:
    """The recipe whose mini-batch is one micro-batch of so many images, and which compares no gradients.

    The comparisons of one micro-batch are not those of the mini-batch; `layouts` adds the memory that they take.
    """
    bn_size, group_size = (images, recipe.group_size) if recipe.bn_size else (0, images)
    optimizer = replace(recipe.optimizer, agvm=False)
    return replace(
        recipe,
        batch_size=images,
        bn_size=bn_size,
        group_size=group_size,
        start_from="",
        noise_interval=0,
        optimizer=optimizer,
    )


def measure_here(task: Task) -> dict[str, Any]:
    """Seconds and bytes of steps of one and of two micro-batches, and of an evaluation batch if there is one."""
    recipe = micro_batch_recipe(parse_recipe(task.recipe, "the planned recipe"), task.images)
    world = start_world(task.device)
    others = others_bytes(world.device)
    trainer = make_trainer(recipe, _classes_alone(task.num_classes), recipe_layout(recipe, world.size), world)
    batches: dict[str, Batch] = torch.load(task.batches, weights_only=False)
    typical, largest = (_first(batches[name], task.images).to(world.device) for name in ("typical", "largest"))
    steps = {
        (kind, rounds): _step(trainer, batch, rounds, world)
        for kind, batch in (("typical", typical), ("largest", largest))
        for rounds in (1, 2)
    }
    steps["typical", 1]()  # the first step makes the momentum and lets the libraries choose their kernels
    if task.waits:
        _wait_for_the_others(Path(task.out))
    points = []
    for rounds in (1, 2):  # the peak never falls, so the smaller one comes first
        seconds = _seconds(steps["typical", rounds], task.timed_steps)
        steps["largest", rounds]()
        if rounds == 1:
            steps["largest", rounds]()
        points.append({"rounds": rounds, "seconds": seconds, "bytes": peak_bytes(world.device, others)})
    answer: dict[str, Any] = {"points": points, "others_bytes": others}
    if "evaluation" in batches:
        batch = batches["evaluation"].to(world.device)
        trainer.model.eval()

        def detect() -> None:
            detect_batch(trainer.model, batch.pixels, batch.sizes).scores.cpu()

        detect()
        answer["evaluation_seconds"] = _seconds(detect, task.timed_steps) / len(batch.image_index)
        answer["evaluation_bytes"] = peak_bytes(world.device, others)
    return answer


def others_bytes(device: torch.device) -> int:
    """What other processes hold of a GPU, asked before this one computes; 0 on a CPU.

    What is in use then holds this process's context too, whose size nobody tells: all that a context may take counts
    as ours, since a plan that asks for too much memory does less harm than one that asks for too little.
    """
    return 0 if device.type == "cpu" else max(0, _bytes_beside_torch(device) - _CONTEXT_BYTES)


def peak_bytes(device: torch.device, others: int) -> int | None:
    """The most memory so far: of the process on a CPU; on a GPU what torch has reserved and what is held beside it.

    `others` is what other processes held at the start, which does not count.
    """
    if device.type == "cpu":
        return resident_bytes("VmHWM")
    return torch.cuda.max_memory_reserved(device) + max(0, _bytes_beside_torch(device) - others)


def _bytes_beside_torch(device: torch.device) -> int:
    """What is in use of a GPU, by any process, but for what torch has reserved in this one."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _step(trainer: Trainer, batch: Batch, rounds: int, world: World) -> Callable[[], Tensor]:
    return lambda: train_step(trainer, [batch] * rounds, range(rounds), _RATE, 0, world).cpu()


def _seconds(work: Callable[[], object], count: int) -> float:
    """The median of at most so many calls that end with a copy to the CPU."""
    taken: list[float] = []
    while len(taken) < count and sum(taken) < TIMED_SECONDS:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _first(batch: Batch, count: int) -> Batch:
    """The first images of a batch."""
    targets = batch.targets
    return Batch(
        batch.pixels[:count],
        batch.sizes[:count],
        Targets(targets.boxes[:count], targets.labels[:count], targets.image_seeds[:count]),
        batch.image_index[:count],
        batch.scales[:count],
    )


def _classes_alone(count: int) -> CocoDataset:
    """A data set without images: the trainer asks for its classes, the images are in a file."""
    names, none = tuple(f"class {number}" for number in range(count)), np.zeros(0, np.int64)
    boxes = np.zeros((0, 4), np.float32)
    table = AnnotationTable(none, boxes, none, none.astype(np.bool_), boxes[:, 0], none)
    return CocoDataset(Path(), Path(), names, tuple(range(count)), (), (), np.zeros((0, 2), np.int64), table)


def _wait_for_the_others(out: Path) -> None:
    out.with_suffix(".ready").touch()
    while not out.with_name("go").exists():
        time.sleep(_GO_SECONDS)


def main(task: Task) -> None:
    """Measure and leave the answer, or the one line that says why there is none."""
    if task.threads:
        torch.set_num_threads(task.threads)
    try:
        answer = measure_here(task)
    except InputError as error:
        answer = {"error": str(error)}
    except torch.OutOfMemoryError:
        answer = {"does_not_fit": True}
    write_json_atomically(Path(task.out), answer)


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
