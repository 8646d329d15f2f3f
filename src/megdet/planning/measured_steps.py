"""The work of a helper that `measuring` starts: times steps with micro-batches of one size, and measures memory.

It uses the code of a run: `make_trainer`, `train_step`, the allocator of `start_world`. The learning rate is so small
that the weights do not move, and every step has the same work.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from megdet.distributed.layout import recipe_layout
from megdet.distributed.world import World, start_world
from megdet.errors import InputError
from megdet.inference.predict import detect_batch
from megdet.planning import pictures as pictures  # a run draws at its end, so its memory includes these modules
from megdet.recipe import Recipe
from megdet.structures import Batch
from megdet.training.checkpoint_writer import copied
from megdet.training.step import train_step
from megdet.training.trainer import Trainer, make_trainer

_RATE = 1e-9
TIMED_SECONDS = 20.0
"""Seconds for steps of one kind; at least one step is made."""
TIMED_STEPS = 5
"""The most timed steps of one kind, by default."""
_LOOK_SECONDS = 0.002
"""Seconds between two checks that all processes that measure side by side have arrived."""
_CONTEXT_BYTES = 1 << 30
"""Memory of a GPU that a process may hold before it computes: a CUDA context usually takes less."""


class DoesNotFitError(InputError):
    """The steps do not fit the GPU."""


@dataclass(frozen=True)
class Task:
    """The task of a measuring process."""

    recipe: Recipe
    num_classes: int
    images: int
    """images of a micro-batch"""
    device: str
    batches: Path
    """file with the Batches typical, largest and, if the evaluation is measured too, evaluation"""
    timed_steps: int


@dataclass(frozen=True)
class Meeting:
    """A meeting point: processes that measure side by side wait for each other there."""

    folder: Path
    place: int
    """index of this process among them, from 0"""
    count: int

    def wait(self) -> None:
        """Return when all have arrived. If one fails, the process that started them stops the others."""
        (self.folder / f"here{self.place}").touch()
        while not all((self.folder / f"here{other}").exists() for other in range(self.count)):
            time.sleep(_LOOK_SECONDS)


class Answer(NamedTuple):
    """The results of a measuring process."""

    seconds: tuple[float, float]
    """seconds of a step of one micro-batch, and of two"""
    bytes: tuple[int | None, int | None]
    """peak of memory up to each of these steps"""
    others_bytes: int
    """memory of the GPU that other processes held when it began"""
    evaluation: tuple[float, int | None] | None
    """seconds of an image, and the peak of memory until then"""


def resident_bytes(key: str) -> int | None:
    """VmRSS or VmHWM (its peak) of this process; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def micro_batch_recipe(recipe: Recipe, images: int) -> Recipe:
    """The recipe with a mini-batch of one micro-batch of so many images, without comparisons of gradients.

    Comparisons would not be those of the whole mini-batch; `layouts.py` adds their memory.
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


def measure_here(task: Task, meeting: Meeting) -> Answer:
    """Steps of one and two micro-batches, and an evaluation batch if there is one. Raises DoesNotFitError."""
    try:
        return _measure(task, meeting)
    except torch.OutOfMemoryError:
        raise DoesNotFitError(f"micro-batches of {task.images} images do not fit this device") from None


def _measure(task: Task, meeting: Meeting) -> Answer:
    recipe = micro_batch_recipe(task.recipe, task.images)
    world = start_world(task.device)
    others = others_bytes(world.device)
    class_names = tuple(map(str, range(task.num_classes)))
    trainer = make_trainer(recipe, class_names, recipe_layout(recipe, world.size), world)
    batches: dict[str, Batch] = torch.load(task.batches, weights_only=False)
    typical, largest = (batches[name][: task.images].to(world.device) for name in ("typical", "largest"))
    _step(trainer, typical, 1, world)  # it allocates the momentum, and the libraries choose their kernels
    on_cpu = world.device.type == "cpu"
    checkpoint = copied(trainer.state(), {}) if on_cpu else {}  # where a run keeps one beside what it trains
    meeting.wait()
    seconds, peaks = [], []
    for rounds in (1, 2):  # the peak never falls, so the smaller one comes first
        seconds.append(_seconds(partial(_step, trainer, typical, rounds, world), task.timed_steps))
        for _ in range(3 - rounds):
            _step(trainer, largest, rounds, world)
        peaks.append(peak_bytes(world.device, others))
    evaluation = None
    if "evaluation" in batches:
        batch = batches["evaluation"].to(world.device)
        trainer.model.eval()

        def detect() -> None:
            detect_batch(trainer.model, batch.pixels, batch.sizes, recipe.precision).scores.cpu()

        detect()
        evaluation = _seconds(detect, task.timed_steps) / len(batch.image_index), peak_bytes(world.device, others)
    checkpoint.clear()
    return Answer((seconds[0], seconds[1]), (peaks[0], peaks[1]), others, evaluation)


def others_bytes(device: torch.device) -> int:
    """The memory of a GPU that other processes hold, before this one computes; 0 on a CPU.

    The memory in use includes this process's own context, whose size is not known. The most that a context may take
    counts as ours: a plan that asks for too much memory does less harm than one that asks for too little.
    """
    return 0 if device.type == "cpu" else max(0, _bytes_beside_torch(device) - _CONTEXT_BYTES)


def peak_bytes(device: torch.device, others: int) -> int | None:
    """The peak of memory so far: of the process on a CPU; on a GPU what torch has reserved, and the rest in use.

    `others` is what other processes held at the start; it does not count.
    """
    if device.type == "cpu":
        return resident_bytes("VmHWM")
    return torch.cuda.max_memory_reserved(device) + max(0, _bytes_beside_torch(device) - others)


def _bytes_beside_torch(device: torch.device) -> int:
    """The memory of a GPU in use by any process, without what torch has reserved in this one."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _step(trainer: Trainer, batch: Batch, rounds: int, world: World) -> None:
    train_step(trainer, [batch] * rounds, range(rounds), _RATE, 0, world).gradient_norm.cpu()


def _seconds(work: Callable[[], object], count: int) -> float:
    """The median seconds of at most so many calls; each ends with a copy to the CPU."""
    taken: list[float] = []
    while len(taken) < count and sum(taken) < TIMED_SECONDS:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
