"""Measures time and memory of training steps on this machine, for the planner.

Each kind of step (recompute plan, images of a micro-batch) has its own helper (`measured_steps.py`), because the peak
of a process's memory never falls. On a CPU memory is the peak of resident memory of the whole process, with the data
set of a run but without the processes that load its images. On a GPU it is the peak that torch has reserved plus the
rest in use (the CUDA context), without what other processes held at the start.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import distributed

from megdet.data.coco import CocoDataset
from megdet.data.plan import TrainingPlan, evaluation_plan
from megdet.data.planned import PlannedImage
from megdet.data.sampling.frequencies import training_plan
from megdet.data.transforms import load_batch
from megdet.distributed.gradients import BUCKET_BYTES
from megdet.distributed.helper import HelperEndedError, answers_of, start_helper
from megdet.distributed.layout import Layout
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.planning.measured_steps import (
    TIMED_STEPS,
    Answer,
    DoesNotFitError,
    Meeting,
    Task,
    measure_here,
    resident_bytes,
)
from megdet.planning.measurement import Measurement, TimedSteps
from megdet.recipe import Recipe, RecomputePlan
from megdet.recipe_file import dump_recipe
from megdet.run_folder.environment import collect_environment
from megdet.runtime import device_kind
from megdet.structures import Batch
from megdet.training.datasets import Datasets, check_statistics, load_datasets

_Canvas = tuple[int, int]
_MESSAGES = 30
"""Collectives of each size; their median is the time of the link."""


def say_nothing(_line: str) -> None:
    """The default for `progress`."""


@dataclass(frozen=True)
class Measuring:
    """Options of measuring."""

    sizes: Sequence[int] = ()
    """images of the micro-batches; empty = by the layout"""
    plans: Sequence[RecomputePlan] = ()
    """recompute plans beside the recipe's; empty = all that its backbone has"""
    device: str = ""
    side_by_side: int = 1
    """processes that measure at the same time"""
    workers: int = 1
    """loading processes a rank of the planned run; 0 = the training process loads between its steps"""
    timed_steps: int = TIMED_STEPS
    """timed steps of each kind"""


def sizes_to_measure(layout: Layout) -> list[int]:
    """Micro-batches to measure for a layout: its own but at most 8 images, half of that, and 1."""
    largest = min(8, layout.largest_share)
    return sorted({1, -(-largest // 2), max(2, largest)})


def measure(recipe: Recipe, how: Measuring, progress: Callable[[str], None] = say_nothing) -> Measurement:
    """Time and memory of steps of this recipe here, for micro-batches of some sizes and for some recompute plans.

    The first recompute plan is measured at all sizes, the others at the smallest and the largest; the evaluation is
    measured with the first. Sizes that do not fit a GPU are left out. Processes side by side have one thread each
    (unless OMP_NUM_THREADS says otherwise) or one GPU each, as torchrun starts them; the slowest counts.

    Raises InputError for data that cannot be read, too few images, and a process that fails.
    """
    kind = device_kind(how.device)
    before = resident_bytes("VmRSS")
    datasets = load_datasets(recipe, World(0, 1, torch.device("cpu")))
    plan = training_plan(datasets.train, recipe)
    check_statistics(recipe, plan, datasets.train)
    data_bytes = 0 if before is None or kind != "cpu" else max(0, (resident_bytes("VmRSS") or before) - before)
    canvases = plan.canvases().counts
    chosen = {"typical": typical_canvas(canvases), "largest": max(canvases, key=lambda c: (c[0] * c[1], c))}
    sizes = sorted(set(how.sizes))
    ends = sorted({sizes[0], sizes[-1]})
    kinds = [(recompute, size) for number, recompute in enumerate(how.plans) for size in (ends if number else sizes)]
    points: list[TimedSteps] = []
    evaluation: tuple[float, int | None] = 0.0, None
    others = 0
    with tempfile.TemporaryDirectory(prefix="megdet_plan_") as name:
        started = time.perf_counter()
        batches = {key: _batch(datasets.train, plan, canvas, sizes[-1]) for key, canvas in chosen.items()}
        load_seconds = (time.perf_counter() - started) / (len(chosen) * sizes[-1])
        training, both = Path(name) / "training.pt", Path(name) / "both.pt"
        torch.save(batches, training)
        torch.save({**batches, "evaluation": _evaluation_batch(datasets, recipe)}, both)
        for recompute, images in kinds:
            progress(f"measuring recompute {recompute}, micro-batches of {images} image{'s' * (images > 1)}")
            task = Task(
                replace(recipe, recompute=recompute),
                len(datasets.train.class_names),
                images,
                kind,
                training if points else both,
                how.timed_steps,
            )
            try:
                found = _measure_together(task, how.side_by_side)
            except DoesNotFitError as error:
                progress(f"{error}: left out")
                continue
            # among processes side by side the slowest and the largest count
            points += [
                TimedSteps(
                    recompute,
                    images,
                    rounds,
                    max(answer.seconds[rounds - 1] for answer in found),
                    _largest([answer.bytes[rounds - 1] for answer in found], data_bytes),
                )
                for rounds in (1, 2)
            ]
            others = max(others, *(answer.others_bytes for answer in found))
            evaluated = [answer.evaluation for answer in found if answer.evaluation is not None]
            if evaluated:
                evaluation = max(took for took, _ in evaluated), _largest([peak for _, peak in evaluated], data_bytes)
    if not points:
        raise InputError("no micro-batch of these sizes fits this device: give smaller --sizes")
    environment = collect_environment(1, kind)
    return Measurement(
        dump_recipe(recipe),
        kind,
        environment["devices"][0]["name"] if environment["devices"] else environment["cpu"]["model"],
        how.side_by_side,
        len(datasets.train),
        len(datasets.val),
        len(datasets.train.class_names),
        chosen["typical"],
        chosen["largest"],
        load_seconds,
        *evaluation,
        tuple(points),
        others_bytes=others,
    )


def _largest(peaks: Sequence[int | None], data_bytes: int) -> int | None:
    known = [peak for peak in peaks if peak is not None]
    return max(known) + data_bytes if known else None


def _measure_together(task: Task, count: int) -> list[Answer]:
    """The answers of so many new processes that make the same steps at the same time.

    Raises DoesNotFitError, and InputError for any other failure.
    """
    # torchrun gives one thread to each of several processes
    threads = 1 if count > 1 and "OMP_NUM_THREADS" not in os.environ else 0
    with tempfile.TemporaryDirectory(prefix="megdet_measure_") as name, ExitStack() as started:
        helpers = []
        for place in range(count):
            own, device = Path(name) / f"process{place}", torch.device(task.device, place)
            own.mkdir()
            meeting = Meeting(Path(name), place, count)
            helpers.append(start_helper(measure_here, task, meeting, folder=own, device=device, threads=threads))
            started.callback(helpers[-1].stop)
        try:
            return answers_of(helpers)
        except HelperEndedError as error:
            why = f"{error}; give smaller --sizes"
        except DoesNotFitError:
            raise
        except InputError as error:
            why = str(error)
        raise InputError(f"measuring micro-batches of {task.images} images failed: {why}")


def typical_canvas(counts: Mapping[_Canvas, int]) -> _Canvas:
    """The canvas of an epoch whose area is nearest to the mean; `counts` are numbers of groups."""
    mean = sum(h * w * count for (h, w), count in counts.items()) / sum(counts.values())
    return min(counts, key=lambda canvas: (abs(canvas[0] * canvas[1] - mean), canvas))


def measure_link(progress: Callable[[str], None] = say_nothing) -> tuple[float, float]:
    """Seconds of a hop and bytes a second between two processes of this machine over gloo."""
    progress("measuring the communication of two processes")
    small, large = run_in_ranks(_time_sums, 2)[0]
    # an all-reduce over two ranks takes two hops, and a rank sends half of its bytes in each
    return small / 2, BUCKET_BYTES / max(large - small, 1e-9)


def _time_sums(world: World) -> tuple[float, float]:
    """Median seconds of a sum of one number and of a whole bucket."""
    medians = []
    for count in (1, BUCKET_BYTES // 4):
        tensor, taken = torch.zeros(count), []
        for _ in range(_MESSAGES):
            world.barrier()
            started = time.perf_counter()
            distributed.all_reduce(tensor)
            taken.append(time.perf_counter() - started)
        medians.append(sorted(taken)[_MESSAGES // 2])
    return medians[0], medians[1]


def _batch(dataset: CocoDataset, plan: TrainingPlan, canvas: _Canvas, count: int) -> Batch:
    """So many images of the first epoch's groups on a canvas, repeated if there are fewer."""
    found: list[PlannedImage] = []
    for step in range(plan.epoch_end(1)):
        found += [image for group in plan.groups(step) if group.canvas == canvas for image in group.images]
        if len(found) >= count:
            break
    images = [found[i % len(found)] for i in range(count)]
    return load_batch(dataset, images, canvas, plan.recipe.data.color_jitter)


def _evaluation_batch(datasets: Datasets, recipe: Recipe) -> Batch:
    """The evaluation batch of the largest canvas."""
    groups = evaluation_plan(datasets.val.sizes, recipe)
    largest = max(groups, key=lambda group: group.canvas[0] * group.canvas[1] * len(group.images))
    return load_batch(datasets.val, largest.images, largest.canvas)
