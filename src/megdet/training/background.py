"""Evaluations in a process of their own, while the training goes on.

Rank 0 has a `BackgroundEvaluations`. It starts `python -m megdet.training.background` for a checkpoint that is written;
that process leaves its detections and then its numbers in a hidden folder of the run, and ends. The next look of the
training finds them. No process outlives the training: it is ended with it, and ends itself where that was killed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megdet.data.coco import validation_set
from megdet.distributed.spare import alone_on
from megdet.distributed.world import World, start_world
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import CocoNumbers, evaluate_detections
from megdet.files import cannot_write, read_json, write_json_atomically
from megdet.inference.predict import category_ids_for, detect_dataset
from megdet.inference.trained import load_detector
from megdet.journal.run_folder import RunFolder
from megdet.recipe import Recipe
from megdet.runtime import device_beside, slow_at, usable_cores

_HIDDEN = ".evaluation_"
_PARENT_SECONDS = 0.5
"""Between two looks of an evaluation whether the training still lives."""
_NICENESS = 10
"""The training, and the processes that load its images, go first where both want a core."""


@dataclass(frozen=True)
class Finished:
    """An evaluation that is done; its detections are in the run folder."""

    step: int
    numbers: CocoNumbers
    seconds: float


@dataclass(frozen=True)
class _Task:
    """What the process is told."""

    folder: str
    step: int
    device: str
    workers: int
    threads: int
    out: str
    parent: int
    overrides: dict[str, str]
    """of the run's recipe"""


@dataclass(frozen=True)
class _Running:
    step: int
    out: Path
    process: subprocess.Popen[bytes]


def agree_on_device(in_background: bool, evaluate_on: str, world: World) -> torch.device | None:
    """The device of evaluations beside the training, None where all ranks evaluate together; every rank calls it.

    Raises InputError for a device that rank 0 does not have.
    """
    if not in_background:
        if evaluate_on:
            raise InputError(f"--evaluate-on {evaluate_on} is for --evaluate-in-background: give both or neither")
        return None
    return world.on_first(lambda: device_beside(evaluate_on, world.device))


def overrides_beside(recipe: Recipe, device: torch.device, training_device: torch.device) -> tuple[dict[str, str], str]:
    """The keys of a recipe that evaluations beside its training change, and the figures that are the reason.

    A processor that is slow at bfloat16 evaluates a training on GPUs in float32. Beside a training on the same kind of
    device an evaluation computes as one in the foreground.
    """
    figures = "" if device.type == training_device.type else slow_at(recipe.precision, device)
    return ({"precision": "float32"} if figures else {}), figures


class BackgroundEvaluations:
    """Evaluations of checkpoints of a run, one after the other in the order of `start`; closing it ends them.

    Args:
        folder: the run folder; this process holds its lock.
        device: what they compute on.
        workers: processes that load images.
        training_device: what the training computes on. Where both are the CPU an evaluation has the training's number
            of threads, so that it rounds like one in the foreground; beside a training on GPUs it has all cores.
        overrides: of the run's recipe, as `overrides_beside` gives them.
    """

    def __init__(
        self,
        folder: RunFolder,
        device: torch.device,
        workers: int,
        training_device: torch.device,
        overrides: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.device, self.workers, self.overrides = folder, device, workers, overrides or {}
        self.threads = torch.get_num_threads() if device.type == training_device.type else usable_cores()
        self._waiting: deque[int] = deque()
        self._running: _Running | None = None
        for leftover in folder.path.glob(f"{_HIDDEN}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    @property
    def steps(self) -> list[int]:
        """Of the evaluations that are not done, the running one first; their checkpoints must stay."""
        return [*([self._running.step] if self._running else []), *self._waiting]

    def start(self, step: int) -> None:
        """Evaluate the checkpoint of this step, at once or when those before are done. Raises InputError."""
        self._waiting.append(step)
        if self._running is None:
            self._launch()

    def poll(self) -> Finished | None:
        """An evaluation that is done, else None; never waits, but starts the next one.

        Raises:
            InputError: the evaluation failed; with its step and its reason. It counts as not done.
        """
        if self._running is None:
            if self._waiting:
                self._launch()
            return None
        running, code = self._running, self._running.process.poll()
        if code is None:
            return None
        result = read_json(running.out / "result.json") if (running.out / "result.json").exists() else {}
        reason = result.get("error", None if "numbers" in result else _how(code))
        if reason is not None:
            raise InputError(
                f"the evaluation of step {running.step} in the background failed: {reason}; the training is saved, and "
                "the same command makes up for the evaluation and goes on"
            )
        try:
            (running.out / "detections.json").replace(self.folder.detections)
        except OSError as error:
            raise cannot_write(self.folder.detections, error) from error
        self._running = None
        shutil.rmtree(running.out, ignore_errors=True)
        return Finished(running.step, CocoNumbers.from_dict(result["numbers"]), result["seconds"])

    def wait(self, seconds: float) -> None:
        """Wait for the running evaluation to end, at most so long."""
        if self._running is not None:
            try:
                self._running.process.wait(seconds)
            except subprocess.TimeoutExpired:
                return

    def close(self) -> None:
        """End the running evaluation and forget those that wait; the next start of the run makes up for them."""
        self._waiting.clear()
        running, self._running = self._running, None
        if running is None:
            return
        if running.process.poll() is None:
            if os.name == "posix":
                os.killpg(running.process.pid, signal.SIGKILL)  # with the processes that load its images
            else:
                running.process.kill()
        running.process.wait()
        shutil.rmtree(running.out, ignore_errors=True)

    def __enter__(self) -> "BackgroundEvaluations":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _launch(self) -> None:
        step = self._waiting[0]
        # an interpreter that has the current folder on its path may take a file of the user's for a module
        has_folder = "" in sys.path or str(Path.cwd()) in sys.path
        command = [sys.executable, *([] if has_folder else ["-P"]), "-m", __name__]
        try:
            out = Path(tempfile.mkdtemp(prefix=f"{_HIDDEN}{step:08d}_", dir=self.folder.path))
            place = (str(self.folder.path), step, str(self.device), self.workers, self.threads)
            task = _Task(*place, str(out), os.getpid(), self.overrides)
            process = subprocess.Popen(
                [*command, json.dumps(asdict(task))],
                env=alone_on(self.device),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt at the keyboard is for the training, which ends this in order
            )
        except OSError as error:
            raise InputError(f"the evaluation of step {step} cannot be started: {error.strerror}") from error
        self._running = _Running(self._waiting.popleft(), out, process)


def _how(code: int) -> str:
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name} (out of memory?)"
    return f"its process ended with exit code {code} and said no more than what stands above"


def _end_with(parent: int) -> None:
    """End this process and those that load its images when the training is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _evaluate(task: _Task) -> dict[str, Any]:
    world = start_world(torch.device(task.device).type)
    started = time.perf_counter()
    trained = load_detector(RunFolder(task.folder), world.device, task.overrides, step=task.step)
    dataset = validation_set(trained.recipe.data)
    ids = category_ids_for(trained.class_names, dataset)
    try:
        results = detect_dataset(trained.model, trained.recipe, dataset, ids, world, workers=task.workers)
    except torch.OutOfMemoryError:
        raise InputError(
            f"{trained.recipe.evaluation.batch_size} images do not fit {world.device}: choose another --evaluate-on"
        ) from None
    numbers = evaluate_detections(dataset.annotations_file, results)
    write_json_atomically(Path(task.out) / "detections.json", results)
    return {"step": task.step, "numbers": numbers.as_dict(), "seconds": time.perf_counter() - started}


def main(task: _Task) -> None:
    """Evaluate one checkpoint and write result.json: its numbers, or the one line that says why there are none."""
    if os.name == "posix":
        threading.Thread(target=_end_with, args=(task.parent,), daemon=True).start()
        os.nice(_NICENESS)
    torch.set_num_threads(task.threads)
    try:
        result = _evaluate(task)
    except InputError as error:
        result = {"step": task.step, "error": " ".join(str(error).split())}
    except Exception as error:
        traceback.print_exc()  # a bug of ours; the training says in one line that there was one
        result = {"step": task.step, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    write_json_atomically(Path(task.out) / "result.json", result)


if __name__ == "__main__":
    main(_Task(**json.loads(sys.argv[1])))
