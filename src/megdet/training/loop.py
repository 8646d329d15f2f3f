"""The training run: prepare, resume, step after step, evaluate, save."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megdet.data.loader import training_batches
from megdet.data.plan import TrainingPlan
from megdet.distributed.failures import shared_fate
from megdet.distributed.layout import Layout, choose_layout
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import CocoNumbers, evaluate_detections
from megdet.files import write_json_atomically
from megdet.inference.predict import category_ids_for, detect_dataset
from megdet.journal.checkpoint_files import checkpoint_path, latest_checkpoint, save_checkpoint, update_state
from megdet.journal.metrics import MetricsWriter
from megdet.journal.run_folder import RunFolder
from megdet.model.detector import LOSSES
from megdet.recipe import Recipe
from megdet.training.prepare import (
    Datasets,
    Resumed,
    check_folder,
    check_statistics,
    checkpoint_tensors,
    claim_folder,
    load_datasets,
    make_trainer,
    resume,
)
from megdet.training.report import Reporter
from megdet.training.schedule import learning_rate, total_steps
from megdet.training.step import REPORTED, Trainer, train_step

READ_EVERY = 20
"""Steps whose numbers are read from the device together, ..."""
READ_SECONDS = 10.0
"""... unless they take longer than this."""


@dataclass(frozen=True)
class RunOptions:
    """What belongs to this machine and not to the recipe; none of it changes the result."""

    workers: int = 1
    """processes a rank that load images; 0 = the training process itself"""
    lane_width: int | None = None
    """force the ranks that carry one group together"""
    max_images_per_device: int | None = None
    """largest micro-batch of a device, in images"""


def train(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> CocoNumbers:
    """Train from the newest checkpoint of the folder, or from the start, to the end; returns the last evaluation.

    Every rank calls it. Raises InputError for everything a user can mend, before the first step where possible; what
    one rank meets stops all of them.
    """
    with shared_fate(world):
        return _train(recipe, folder, options, world)


def _train(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> CocoNumbers:
    layout = choose_layout(
        recipe.groups_per_step,
        recipe.images_per_group,
        world.size,
        options.lane_width,
        options.max_images_per_device,
    )
    check_folder(folder, recipe)
    datasets = load_datasets(recipe, world)
    plan = TrainingPlan(datasets.train.sizes, recipe)
    check_statistics(recipe, plan, datasets.train)
    is_resumed = latest_checkpoint(folder) is not None
    trainer = make_trainer(recipe, datasets.train, layout, world, is_resumed=is_resumed)
    with ExitStack() as opened:
        lock = claim_folder(folder, recipe, world)
        if lock is not None:
            opened.enter_context(lock)
        resumed = resume(trainer, folder, datasets.train, world)
        reporter = Reporter(recipe, plan, layout, world, folder, first_step=resumed.step)
        metrics = MetricsWriter(folder.metrics, resume_step=resumed.step) if world.is_first else None
        if metrics is not None:
            opened.enter_context(metrics)
        run = _Run(recipe, folder, options, world, layout, datasets, plan, trainer, reporter, metrics, resumed)
        try:
            run.to_end()
        except torch.OutOfMemoryError:
            raise InputError(
                f"a micro-batch of {layout.largest_share} images does not fit {world.device}: use more devices, "
                "--max-images-per-device, a smaller bn_size or smaller data.short_edges"
            ) from None
    if run.numbers is None:
        raise InputError(f"{folder.path}: the run is over but has no evaluation: run `megdet evaluate {folder.path}`")
    return run.numbers


@dataclass
class _Run:
    recipe: Recipe
    folder: RunFolder
    options: RunOptions
    world: World
    layout: Layout
    datasets: Datasets
    plan: TrainingPlan
    trainer: Trainer
    reporter: Reporter
    metrics: MetricsWriter | None
    resumed: Resumed

    def __post_init__(self) -> None:
        self.numbers, self.evaluated_step = self.resumed.numbers, self.resumed.evaluated_step

    def to_end(self) -> None:
        """Make all steps that are left; an evaluation that is due at the first of them comes before."""
        step, last = self.resumed.step, total_steps(self.recipe, self.plan.num_images)
        stops = self._stops(last)
        if step in stops and self._is_evaluated(stops[step]) and self.evaluated_step != step:
            self.numbers = self._evaluate(step)
            if self.world.is_first:
                update_state(checkpoint_path(self.folder, step), self._state(step))
        micro_batches = training_batches(
            self.datasets.train,
            self.plan,
            self.layout,
            self.world.rank,
            (step, last),
            workers=self.options.workers,
            device=self.world.device,
        )
        pending: list[tuple[int, float, float, float, Tensor]] = []
        before = last_read = time.perf_counter()
        while step < last:
            rate = learning_rate(self.recipe, self.plan.num_images, step)
            waiting = _Waiting(micro_batches)
            number = len(self.layout.groups_of(self.world.rank))
            result = train_step(self.trainer, islice(waiting, number), number, rate, step, self.world)
            step += 1
            # from the end of one step to the end of the next, so that waiting for a device counts as well
            now = time.perf_counter()
            pending.append((step, rate, now - before, waiting.seconds, result))
            before = now
            if len(pending) == READ_EVERY or now - last_read >= READ_SECONDS or step in stops:
                self._read(pending)
                pending, last_read = [], now
            if step in stops:
                self._stop(step, stops[step])
                before = time.perf_counter()

    def _stops(self, last: int) -> dict[int, int]:
        """Step -> the epoch that ends there, 0 for the end of the run within an epoch."""
        ends = {self.plan.epoch_end(e): e for e in range(1, math.ceil(self.plan.epochs_done(last)) + 1)}
        stops = {step: epoch for step, epoch in ends.items() if step < last}
        return stops | {last: 0}

    def _read(self, pending: list[tuple[int, float, float, float, Tensor]]) -> None:
        values = torch.stack([result for *_, result in pending]).tolist()
        lines = []
        for (step, rate, seconds, data_seconds, _), row in zip(pending, values, strict=True):
            named = dict(zip((*REPORTED, "gradient_norm"), row, strict=True))
            loss = sum(named[name] for name in LOSSES)
            if not math.isfinite(loss) or not math.isfinite(named["gradient_norm"]):
                worst = next((name for name in named if not math.isfinite(named[name])), "loss")
                raise InputError(
                    f"step {step}: {worst} is not finite (learning rate {rate:.4g}): lower optimizer.base_lr, lengthen "
                    "schedule.warmup_steps or set optimizer.clip_norm; the last checkpoint is kept"
                )
            line = {
                "step": step,
                "epoch": round(self.plan.epochs_done(step), 6),
                "learning_rate": rate,
                "loss": loss,
                **named,
                "seconds": round(seconds, 6),
                "data_seconds": round(data_seconds, 6),
            }
            if self.metrics is not None:
                self.metrics.write(line)
            lines.append(line)
        self.reporter.steps(lines)

    def _stop(self, step: int, epoch: int) -> None:
        # saved first: whatever goes wrong in the evaluation, the epoch is not lost
        saves = epoch == 0 or epoch % self.recipe.checkpoint_epochs == 0
        if saves:
            self._save(step)
        if self._is_evaluated(epoch):
            self.numbers = self._evaluate(step)
            if saves and self.world.is_first:
                update_state(checkpoint_path(self.folder, step), self._state(step))

    def _is_evaluated(self, epoch: int) -> bool:
        every = self.recipe.evaluation.every_epochs
        return epoch == 0 or bool(every and epoch % every == 0)

    def _evaluate(self, step: int) -> CocoNumbers:
        started = time.perf_counter()
        model, averages = self.trainer.model, self.trainer.averages
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()} if averages else None
        if averages is not None:
            model.load_state_dict(averages.tensors)
        results = detect_dataset(
            model,
            self.datasets.val,
            category_ids_for(self.datasets.train.class_names, self.datasets.val),
            self.world,
            workers=self.options.workers,
        )
        if own is not None:
            model.load_state_dict(own)
        model.train()
        truth = self.datasets.val.annotations_file
        own_numbers = evaluate_detections(truth, results) if self.world.is_first else None
        numbers: CocoNumbers = self.world.gather_objects(own_numbers)[0]
        seconds = time.perf_counter() - started
        if self.metrics is not None:
            self.metrics.write({"step": step, "evaluation": _without_classes(numbers), "seconds": round(seconds, 3)})
            write_json_atomically(self.folder.detections, results)
            write_json_atomically(self.folder.evaluation, numbers.as_dict(), indent=2)
        self.reporter.evaluated(step, numbers, seconds)
        self.evaluated_step = step
        return numbers

    def _save(self, step: int) -> None:
        if self.world.is_first:
            tensors = checkpoint_tensors(self.trainer)
            save_checkpoint(self.folder, step, tensors, self._state(step), self.recipe.keep_checkpoints)
        self.world.barrier()

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "class_names": list(self.datasets.train.class_names),
            "category_ids": list(self.datasets.train.category_ids),
            "num_images": self.plan.num_images,
            "data": self.resumed.fingerprint,
            "evaluation": None if self.numbers is None else self.numbers.as_dict(),
            "evaluated_step": self.evaluated_step,
        }


class _Waiting:
    """Iterates over batches and adds up the time spent waiting for them."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[Any]:
        while True:
            started = time.perf_counter()
            batch = next(self.batches, None)
            self.seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch


def _without_classes(numbers: CocoNumbers) -> dict[str, Any]:
    return {key: value for key, value in numbers.as_dict().items() if key != "per_class"}
