"""Evaluations in a process of their own, while the training goes on.

Rank 0 has a `BackgroundEvaluations`, which starts a helper for a checkpoint. The helper writes its detections into a
hidden folder of the run and answers with its numbers, which the training picks up at its next poll.
"""

import shutil
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from megdet.data.classes import category_ids_for
from megdet.data.coco import validation_set
from megdet.distributed.helper import Helper, HelperError, start_helper
from megdet.distributed.world import World, start_world
from megdet.errors import InputError, TooLittleMemoryError
from megdet.evaluation.coco_numbers import Evaluation, evaluate_detections
from megdet.files import cannot_write, write_json_atomically
from megdet.inference.predict import detect_dataset
from megdet.inference.trained import load_detector
from megdet.recipe import Recipe
from megdet.run_folder.folder import RunFolder
from megdet.runtime import device_beside, slow_at, usable_cores, usable_threads

_HIDDEN = ".evaluation_"
_DETECTIONS = "detections.json"
_NICENESS = 10
"""Niceness of the helper: the training and its loading processes have priority."""


@dataclass(frozen=True)
class Finished:
    """An evaluation that is done."""

    step: int
    numbers: Evaluation
    seconds: float


@dataclass(frozen=True)
class _Running:
    step: int
    out: Path
    helper: Helper[Finished]


def agree_on_device(in_background: bool, evaluate_on: str, world: World) -> torch.device | None:
    """The device of evaluations beside the training, None if all ranks evaluate together; every rank calls it.

    Raises InputError for a device that rank 0 does not have.
    """
    if not in_background:
        if evaluate_on:
            raise InputError(f"--evaluate-on {evaluate_on} is for --evaluate-in-background: give both or neither")
        return None
    return world.on_first(lambda: device_beside(evaluate_on, world.device))


def overrides_beside(recipe: Recipe, device: torch.device, training_device: torch.device) -> tuple[dict[str, str], str]:
    """The keys of a recipe that evaluations beside its training change, and the speeds that are the reason.

    A processor that is slow at bfloat16 evaluates a training on GPUs in float32. On the same kind of device as the
    training, an evaluation computes as in the foreground.
    """
    figures = "" if device.type == training_device.type else slow_at(recipe.precision, device)
    return ({"precision": "float32"} if figures else {}), figures


class BackgroundEvaluations:
    """Evaluations of a run's checkpoints, one after the other in the order of `start`; `close` ends them.

    Args:
        folder: the run folder; this process has locked it.
        device: the device of the evaluations.
        workers: processes that load images.
        training_device: the device of the training. If both are the CPU, an evaluation has the training's number of
            threads; beside a training on GPUs it has all cores.
        overrides: keys of the run's recipe to change, from `overrides_beside`.
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
        self.threads = usable_threads() if device.type == training_device.type else usable_cores()
        self._waiting: deque[int] = deque()
        self._running: _Running | None = None
        for leftover in folder.path.glob(f"{_HIDDEN}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    @property
    def steps(self) -> list[int]:
        """The steps of the evaluations that are not done, the running one first; their checkpoints must stay."""
        return [*([self._running.step] if self._running else []), *self._waiting]

    def start(self, step: int) -> None:
        """Evaluate the checkpoint of this step, at once or after the earlier ones. Raises InputError."""
        self._waiting.append(step)
        if self._running is None:
            self._launch()

    def poll(self, evaluated_step: int = -1) -> Finished | None:
        """A finished evaluation, else None; does not wait, and starts the next evaluation.

        Its detections become those of the run folder, unless `evaluated_step` is later.

        Raises:
            InputError: the evaluation failed; the message has its step and its reason. It counts as not done.
        """
        if self._running is None:
            if self._waiting:
                self._launch()
            return None
        running = self._running
        if not running.helper.wait():
            return None
        try:
            finished = running.helper.answer()
        except (InputError, HelperError) as error:
            raise InputError(
                f"the evaluation of step {running.step} in the background failed: {' '.join(str(error).split())}; the "
                "training is saved, and the same command makes up for the evaluation and goes on"
            ) from None
        try:
            if running.step >= evaluated_step:
                (running.out / _DETECTIONS).replace(self.folder.detections)
        except OSError as error:
            raise cannot_write(self.folder.detections, error) from error
        self._running = None
        shutil.rmtree(running.out, ignore_errors=True)
        return finished

    def wait(self, seconds: float) -> None:
        """Wait for the running evaluation to end, at most so long."""
        if self._running is not None:
            self._running.helper.wait(seconds)

    def close(self) -> None:
        """End the running evaluation and drop the waiting ones; the next start of the run makes up for them."""
        self._waiting.clear()
        running, self._running = self._running, None
        if running is None:
            return
        running.helper.stop()
        shutil.rmtree(running.out, ignore_errors=True)

    def _launch(self) -> None:
        step = self._waiting[0]
        try:
            out = Path(tempfile.mkdtemp(prefix=f"{_HIDDEN}{step:08d}_", dir=self.folder.path))
            helper = start_helper(
                _evaluate,
                self.folder,
                step,
                self.device,
                self.workers,
                self.overrides,
                out,
                folder=out,
                device=self.device,
                threads=self.threads,
                niceness=_NICENESS,
            )
        except OSError as error:
            raise InputError(f"the evaluation of step {step} cannot be started: {error.strerror}") from error
        self._running = _Running(self._waiting.popleft(), out, helper)


def _evaluate(
    folder: RunFolder, step: int, device: torch.device, workers: int, overrides: dict[str, str], out: Path
) -> Finished:
    """Evaluate one checkpoint, in a helper; its detections go into the folder `out`."""
    world = start_world(device.type)
    started = time.perf_counter()
    trained = load_detector(folder, world.device, overrides, step=step)
    dataset = validation_set(trained.recipe.data, with_masks=trained.model.has_masks)
    ids = category_ids_for(trained.class_names, dataset)
    try:
        results = detect_dataset(trained.model, trained.recipe, dataset, ids, world, workers=workers)
    except TooLittleMemoryError as error:
        raise InputError(f"{error}, or choose another --evaluate-on") from None
    numbers = evaluate_detections(dataset.annotations_file, results, has_masks=trained.model.has_masks)
    write_json_atomically(out / _DETECTIONS, results)
    return Finished(step, numbers, time.perf_counter() - started)
