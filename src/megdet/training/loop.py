"""The training run: prepare, resume, step after step, evaluate, save."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megdet.data.loader import training_batches
from megdet.data.plan import TrainingPlan
from megdet.distributed.failures import shared_fate
from megdet.distributed.layout import Layout, recipe_layout
from megdet.distributed.world import World
from megdet.errors import DivergedError, InputError
from megdet.evaluation.coco_numbers import CocoNumbers
from megdet.journal.checkpoint_files import save_checkpoint
from megdet.journal.metrics import MetricsWriter, read_metrics
from megdet.journal.run_folder import FolderLock, RunFolder
from megdet.recipe import Recipe
from megdet.run_length import total_steps
from megdet.training.background import BackgroundEvaluations, agree_on_device, overrides_beside
from megdet.training.common_start import compare_commands, compare_data, compare_states, newest_step
from megdet.training.compiled import check_compiler, compile_dense
from megdet.training.epoch_means import EpochMeans
from megdet.training.evaluations import Evaluations
from megdet.training.prepare import (
    Datasets,
    check_folder,
    check_statistics,
    claim_folder,
    load_datasets,
    make_trainer,
    resume,
)
from megdet.training.report import Reporter
from megdet.training.schedule import learning_rate, why_no_warmup
from megdet.training.step import Trainer, named_measures, train_step
from megdet.training.trainer_state import checkpoint_tensors

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
    evaluate_in_background: bool = False
    """evaluate in a process of its own, while the training goes on"""
    evaluate_on: str = ""
    """its device: cpu, cuda, cuda:N; empty = a GPU that no rank computes on where there is one, otherwise the CPU"""
    compile: bool = False
    """compile backbone, pyramid and RPN head for each canvas; the result differs by rounding only"""


def train(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> CocoNumbers:
    """Train from the newest checkpoint of the folder, or from the start, to the end; returns the last evaluation.

    Every rank calls it. Raises InputError for everything a user can mend, before the first step where possible; what
    one rank meets stops all of them.
    """
    with shared_fate(world):
        return _train(recipe, folder, options, world)


def _train(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> CocoNumbers:
    layout = recipe_layout(recipe, world.size, options.lane_width, options.max_images_per_device)
    of_all_ranks = {name: value for name, value in asdict(options).items() if name != "workers"}
    compare_commands(recipe, of_all_ranks, world)
    beside = agree_on_device(options.evaluate_in_background, options.evaluate_on, world)
    if options.compile:
        check_compiler(recipe, world.device)
    world.on_first(lambda: check_folder(folder, recipe))
    datasets = load_datasets(recipe, world)
    compare_data(datasets, world)
    plan = TrainingPlan(datasets.train.sizes, recipe)
    check_statistics(recipe, plan, datasets.train)
    is_resumed = newest_step(folder, world) is not None
    trainer = make_trainer(recipe, datasets.train, layout, world, is_resumed=is_resumed)
    with ExitStack() as opened:
        lock = claim_folder(folder, recipe, world)
        if lock is not None:
            opened.enter_context(lock)
        resumed = resume(trainer, folder, datasets.train, world)
        compare_states(trainer, resumed.step, world)
        reporter = Reporter(recipe, plan, layout, world, folder, first_step=resumed.step)
        if options.compile:
            parts = compile_dense(trainer.model, is_told=world.is_first)
            reporter.say(f"compiled in the first step of each canvas: {', '.join(parts)}")
        metrics = MetricsWriter(folder.metrics, resume_step=resumed.step) if world.is_first else None
        if metrics is not None:
            opened.enter_context(metrics)
        background = None
        if beside is not None and world.is_first:
            overrides, slow = overrides_beside(recipe, beside, world.device)
            background = BackgroundEvaluations(folder, beside, options.workers, world.device, overrides)
            opened.enter_context(background)
            note = f", in float32, since bfloat16 is slow there: {slow}" if slow else ""
            reporter.say(f"evaluations go on beside the training, on {beside}{note}")
        evaluations = Evaluations(
            recipe,
            folder,
            world,
            datasets,
            trainer,
            reporter,
            metrics,
            resumed,
            options.workers,
            options.evaluate_in_background,
            background,
        )
        run = _Run(
            recipe,
            folder,
            options,
            world,
            layout,
            datasets,
            plan,
            trainer,
            reporter,
            metrics,
            lock,
            evaluations,
            EpochMeans(plan, _steps_done(folder) if metrics is not None else []),
            resumed.step,
        )
        try:
            run.to_end()
        except torch.OutOfMemoryError:
            raise InputError(
                f"a micro-batch of {layout.largest_share} images does not fit {world.device}: use more devices, "
                "--max-images-per-device, a smaller bn_size or smaller data.short_edges"
            ) from None
    if evaluations.numbers is None:
        raise InputError(f"{folder.path}: the run is over but has no evaluation: run `megdet evaluate {folder.path}`")
    return evaluations.numbers


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
    """on rank 0"""
    lock: FolderLock | None
    """on rank 0"""
    evaluations: Evaluations
    means: EpochMeans
    first_step: int

    def __post_init__(self) -> None:
        self.saved_step = self.first_step

    def to_end(self) -> None:
        """Make all steps that are left; evaluations that an earlier start did not come to come before."""
        step, last = self.first_step, total_steps(self.recipe, self.plan.num_images)
        stops = self._stops(last)
        missed = self.evaluations.resumed.unevaluated
        self.evaluations.make_up(done for done in missed if done in stops and self._is_evaluated(stops[done]))
        micro_batches = training_batches(
            self.datasets.train,
            self.plan,
            self.layout,
            self.world.rank,
            (step, last),
            workers=self.options.workers,
            device=self.world.device,
        )
        pending: list[_Pending] = []
        before = last_read = time.perf_counter()
        while step < last:
            rate = learning_rate(self.recipe, self.plan.num_images, step)
            waiting = _Waiting(micro_batches)
            groups = self.layout.groups_of(self.world.rank)
            result = train_step(self.trainer, islice(waiting, len(groups)), groups, rate, step, self.world)
            step += 1
            # from the end of one step to the end of the next, so that waiting for a device counts as well
            now = time.perf_counter()
            pending.append(_Pending(step, rate, now - before, waiting.seconds, result, self.trainer.measured))
            before = now
            if len(pending) == READ_EVERY or now - last_read >= READ_SECONDS or step in stops:
                self._read(pending)
                pending, last_read = [], now
                if step not in stops:
                    self._look(step, is_saved=False)
            if step in stops:
                self._stop(step, stops[step])
                before = time.perf_counter()
        self.evaluations.finish()

    def _stops(self, last: int) -> dict[int, int]:
        """Step -> the epoch that ends there, 0 for the end of the run within an epoch."""
        ends = {self.plan.epoch_end(e): e for e in range(1, math.ceil(self.plan.epochs_done(last)) + 1)}
        stops = {step: epoch for step, epoch in ends.items() if step < last}
        return stops | {last: 0}

    def _check_folder(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _read(self, pending: list["_Pending"]) -> None:
        self._check_folder()
        values = torch.stack([done.result for done in pending]).tolist()
        model, lines = self.trainer.model, []
        for done, row in zip(pending, values, strict=True):
            step, rate = done.step, done.rate
            named = dict(zip((*model.reported(), "gradient_norm"), row, strict=True))
            loss = sum(named[name] for name in model.loss_names)
            if not math.isfinite(loss) or not math.isfinite(named["gradient_norm"]):
                worst = next((name for name in named if not math.isfinite(named[name])), "loss")
                warmup = (
                    "lower schedule.warmup_start" if why_no_warmup(self.recipe) else "lengthen schedule.warmup_steps"
                )
                raise DivergedError(
                    f"step {step}: {worst} is not finite (learning rate {rate:.4g}): lower optimizer.base_lr, {warmup} "
                    f"or set optimizer.clip_norm; {self._what_is_kept()}"
                )
            line = {
                "step": step,
                "epoch": round(self.plan.epochs_done(step), 6),
                "learning_rate": rate,
                "loss": loss,
                **named,
                "seconds": round(done.seconds, 6),
                "data_seconds": round(done.data_seconds, 6),
                **named_measures(self.trainer, done.measured),
            }
            if self.metrics is not None:
                self.metrics.write(line)
                self._end_epoch(self.means.add(line))
            lines.append(line)
        self.reporter.steps(lines)

    def _what_is_kept(self) -> str:
        kept = self.saved_step
        return f"the checkpoint of step {kept} is kept" if kept else "no checkpoint had been written yet"

    def _end_epoch(self, line: dict[str, Any] | None) -> None:
        if line is not None and self.metrics is not None:
            self.metrics.write(line)
            self.reporter.epoch_ended(line["epoch_means"])

    def _stop(self, step: int, epoch: int) -> None:
        # saved first: whatever goes wrong in the evaluation, the epoch is not lost
        is_evaluated = self._is_evaluated(epoch)
        saves = epoch == 0 or epoch % self.recipe.checkpoint_epochs == 0
        saves = saves or (is_evaluated and self.evaluations.is_background)
        if saves:
            self._save(step)
        self._look(step, is_saved=saves)
        if is_evaluated:
            self.evaluations.due(step)

    def _look(self, step: int, *, is_saved: bool) -> None:
        """See whether an evaluation in the background is done; one that failed stops the run, which is saved before."""
        try:
            self.evaluations.look()
        except InputError:
            if not is_saved:
                self._write_checkpoint(step)
            raise

    def _is_evaluated(self, epoch: int) -> bool:
        every = self.recipe.evaluation.every_epochs
        return epoch == 0 or bool(every and epoch % every == 0)

    def _save(self, step: int) -> None:
        if self.world.is_first:
            self._write_checkpoint(step)
        self.world.barrier()
        self.saved_step = step

    def _write_checkpoint(self, step: int) -> None:
        tensors, needed = checkpoint_tensors(self.trainer), self.evaluations.needed_checkpoints
        self._check_folder()
        save_checkpoint(self.folder, self.evaluations.state(step), tensors, self.recipe.keep_checkpoints, needed)


@dataclass(frozen=True)
class _Pending:
    """A step that is done and whose numbers are still on the device."""

    step: int
    rate: float
    seconds: float
    data_seconds: float
    result: Tensor
    measured: dict[str, Tensor]


def _steps_done(folder: RunFolder) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder.metrics) if "loss" in line]


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
