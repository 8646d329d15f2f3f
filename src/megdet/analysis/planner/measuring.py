"""Measures time and memory of training steps on this machine, for the planner.

Every kind of step (recompute plan, images of a micro-batch) has a process of its own, `measured_steps`, since the peak
of a process's memory never falls. On a CPU memory is the peak of resident memory of the whole process, with the data
set that a run holds and without the processes that load its images; on a GPU the peak that torch has reserved and what
the device holds beside it (the CUDA context), without what other processes held when a process of ours began.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from megdet.analysis.planner.measured_steps import TIMED_STEPS, Task, resident_bytes
from megdet.analysis.planner.step_cost import Link, Measurement, Point
from megdet.data.coco import CocoDataset
from megdet.data.plan import PlannedImage, TrainingPlan, evaluation_plan
from megdet.data.transforms import load_batch
from megdet.distributed.layout import BUCKET_BYTES
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.files import read_json
from megdet.journal.environment import collect_environment
from megdet.recipe import Recipe, RecomputePlan
from megdet.recipe_file import dump_recipe
from megdet.structures import Batch
from megdet.training.prepare import Datasets, check_statistics, load_datasets

_Canvas = tuple[int, int]
_MESSAGES = 30
"""Collectives of each size whose median is the link's time."""


def say_nothing(_line: str) -> None:
    """Where nobody wants to know what goes on."""


def measure(
    recipe: Recipe,
    sizes: Sequence[int],
    plans: Sequence[RecomputePlan],
    *,
    device: str = "",
    side_by_side: int = 1,
    timed_steps: int = TIMED_STEPS,
    progress: Callable[[str], None] = say_nothing,
) -> Measurement:
    """Time and memory of steps of this recipe here, for micro-batches of these sizes and for these recompute plans.

    The first plan is measured at all sizes and the others at the smallest and the largest; the evaluation beside the
    first. Sizes that do not fit a GPU are left out. `side_by_side` processes measure at the same time, each with one
    thread (unless OMP_NUM_THREADS says otherwise) or on a GPU of its own, as torchrun starts them; the slowest counts.

    Raises InputError for data that cannot be read, too few images, and a process that ends badly.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is visible here; use --device cpu")
    before = resident_bytes("VmRSS")
    datasets = load_datasets(recipe, World(0, 1, torch.device("cpu")))
    plan = TrainingPlan(datasets.train.sizes, recipe)
    check_statistics(recipe, plan, datasets.train)
    data_bytes = 0 if before is None or kind != "cpu" else max(0, (resident_bytes("VmRSS") or before) - before)
    canvases = plan.canvases().counts
    chosen = {"typical": typical_canvas(canvases), "largest": max(canvases, key=lambda c: (c[0] * c[1], c))}
    sizes = sorted(set(sizes))
    points: list[Point] = []
    evaluation: dict[str, Any] = {}
    others = 0
    with tempfile.TemporaryDirectory(prefix="megdet_plan_") as name:
        folder = Path(name)
        started = time.perf_counter()
        batches = {key: _batch(datasets.train, plan, canvas, sizes[-1]) for key, canvas in chosen.items()}
        load_seconds = (time.perf_counter() - started) / (len(chosen) * sizes[-1])
        torch.save(batches, folder / "training.pt")
        torch.save({**batches, "evaluation": _evaluation_batch(datasets, recipe)}, folder / "all.pt")
        for number, recompute in enumerate(plans):
            for images in sizes if number == 0 else sorted({sizes[0], sizes[-1]}):
                progress(f"measuring recompute {recompute}, micro-batches of {images} image{'s' * (images > 1)}")
                evaluates = not points
                answers = _run_together(
                    Task(
                        dump_recipe(replace(recipe, recompute=recompute)),
                        len(datasets.train.class_names),
                        images,
                        kind,
                        _threads(side_by_side),
                        str(folder / ("all.pt" if evaluates else "training.pt")),
                        str(folder / f"{recompute}{images}"),
                        waits=side_by_side > 1,
                        timed_steps=timed_steps,
                    ),
                    side_by_side,
                )
                if any("does_not_fit" in answer for answer in answers):
                    progress(f"micro-batches of {images} images do not fit this device: left out")
                    continue
                points += _points(recompute, images, answers, data_bytes)
                others = max(others, *(answer["others_bytes"] for answer in answers))
                if evaluates:
                    evaluation = _slowest(answers, data_bytes)
    if not points:
        raise InputError("no micro-batch of these sizes fits this device: give smaller --sizes")
    environment = collect_environment(1, kind)
    return Measurement(
        dump_recipe(recipe),
        kind,
        environment["devices"][0]["name"] if environment["devices"] else environment["cpu"]["model"],
        side_by_side,
        len(datasets.train),
        len(datasets.val),
        len(datasets.train.class_names),
        chosen["typical"],
        chosen["largest"],
        load_seconds,
        evaluation["evaluation_seconds"],
        evaluation["evaluation_bytes"],
        tuple(points),
        others_bytes=others,
    )


def typical_canvas(counts: Mapping[_Canvas, int]) -> _Canvas:
    """Of the canvases of an epoch, with their numbers of groups, the one whose area is nearest to the mean."""
    mean = sum(h * w * count for (h, w), count in counts.items()) / sum(counts.values())
    return min(counts, key=lambda canvas: (abs(canvas[0] * canvas[1] - mean), canvas))


def measure_link(progress: Callable[[str], None] = say_nothing) -> Link:
    """Latency and bandwidth between two processes of this machine that talk by gloo."""
    progress("measuring the communication of two processes")
    small, large = run_in_ranks(_time_sums, 2)[0]
    # an all-reduce over two ranks is two hops, in each of which a rank sends half of its bytes
    latency = small / 2
    return Link(latency, BUCKET_BYTES / max(large - small, 1e-9), "measured between two processes of this machine")


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
    """So many images of the first epoch's groups on a canvas, again and again where there are fewer."""
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


def _threads(side_by_side: int) -> int:
    """Threads of a measuring process: torchrun gives one to each of several."""
    return 1 if side_by_side > 1 and "OMP_NUM_THREADS" not in os.environ else 0


def _run_together(task: Task, count: int) -> list[dict[str, Any]]:
    """What so many processes answer that make the same steps at the same time. Raises InputError."""
    folder = Path(task.out)
    folder.mkdir()
    tasks = [replace(task, out=str(folder / f"{number}.json")) for number in range(count)]
    with _started(tasks) as processes:
        if task.waits:
            ready = [Path(own.out).with_suffix(".ready") for own in tasks]
            while not all(file.exists() for file in ready) and all(p.poll() is None for p in processes):
                time.sleep(0.02)
            (folder / "go").touch()
        codes = [process.wait() for process in processes]
    answers = []
    for own, code in zip(tasks, codes, strict=True):
        answer = read_json(Path(own.out)) if code == 0 else {"error": _how(code)}
        if "error" in answer:
            raise InputError(f"measuring micro-batches of {task.images} images failed: {answer['error']}")
        answers.append(answer)
    return answers


@contextmanager
def _started(tasks: Sequence[Task]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes with these tasks, none of which outlives the block."""
    # an interpreter that has the current folder on its path may take a file of the user's for a module
    has_folder = "" in sys.path or str(Path.cwd()) in sys.path
    command = [sys.executable, *([] if has_folder else ["-P"]), "-m", "megdet.analysis.planner.measured_steps"]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number, task in enumerate(tasks):
            place = {"RANK": "0", "LOCAL_RANK": str(number), "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": str(len(tasks))}
            processes.append(
                subprocess.Popen(
                    [*command, json.dumps(asdict(task))],
                    env={**os.environ, **place},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
            )
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _how(code: int) -> str:
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name} (out of memory?); give smaller --sizes"
    return f"its process ended with exit code {code} and said no more than what stands above"


def _points(recompute: RecomputePlan, images: int, answers: Sequence[Any], data_bytes: int) -> list[Point]:
    """The points of one size; of processes side by side the slowest and the largest count."""
    found = []
    for own in zip(*(answer["points"] for answer in answers), strict=True):
        peaks = [point["bytes"] for point in own if point["bytes"] is not None]
        seconds = max(point["seconds"] for point in own)
        memory = max(peaks) + data_bytes if peaks else None
        found.append(Point(recompute, images, own[0]["rounds"], seconds, memory))
    return found


def _slowest(answers: Sequence[Any], data_bytes: int) -> dict[str, Any]:
    peaks = [answer["evaluation_bytes"] for answer in answers if answer["evaluation_bytes"] is not None]
    return {
        "evaluation_seconds": max(answer["evaluation_seconds"] for answer in answers),
        "evaluation_bytes": max(peaks) + data_bytes if peaks else None,
    }
