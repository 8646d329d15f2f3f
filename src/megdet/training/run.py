"""A run: opened once, then stepped.

    with open_run(recipe, world, options, folder) as run:
        for result in run.steps(run.first_step, run.last_step):
            ...
        run.save(run.last_step)

The training loop, the rate test, `megdet verify` and the tests all train in this way.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import torch

from megdet.data.loader import LoadingFaults, training_batches
from megdet.data.plan import TrainingPlan
from megdet.data.sampling.frequencies import training_plan
from megdet.distributed.layout import Layout, recipe_layout
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.memory import is_out_of_memory
from megdet.recipe import Recipe
from megdet.recipe_check import check_new_recipe
from megdet.run_folder.folder import FolderLock, RunFolder
from megdet.run_folder.run_state import RunState
from megdet.run_length import total_steps
from megdet.runtime import operations_on_one_thread
from megdet.structures import Batch
from megdet.training.checkpoint_writer import CheckpointWriter
from megdet.training.common_start import compare_commands, compare_data, compare_states, newest_step
from megdet.training.compiled import check_compiler, compile_dense
from megdet.training.datasets import Datasets, check_statistics, fingerprint, load_datasets
from megdet.training.dry_run import MemoryTrial
from megdet.training.evaluations.background import agree_on_device
from megdet.training.initial_weights import check_sources
from megdet.training.position import Position, kept_to_go_back, mark_evaluated, without_other_scores
from megdet.training.resume import check_folder, claim_folder, facts_of_training, resume, start_at
from megdet.training.schedule import learning_rate, rewarm_factor
from megdet.training.step import StepResult, train_step
from megdet.training.stops import Stops, stops_of
from megdet.training.trainer import Tensors, Trainer, make_trainer
from megdet.training.waiting import Waiting


@dataclass(frozen=True)
class RunOptions:
    """Options of this machine, not of the recipe; none of them changes the result."""

    workers: int = 1
    """processes a rank that load images; 0 = the training process itself"""
    lane_width: int | None = None
    """force the ranks that carry one group together"""
    max_images_per_device: int | None = None
    """largest micro-batch of a device, in images"""
    evaluate_in_background: bool = False
    """evaluate in a process of its own, while the training goes on"""
    evaluate_on: str = ""
    """device of that process: cpu, cuda, cuda:N; empty = a GPU that no rank uses if there is one, else the CPU"""
    compile: bool = False
    """compile backbone, pyramid and RPN head for each canvas; the result differs by rounding only"""
    plain: bool = False
    """print lines, even if the terminal could show a screen"""


@dataclass
class Run:
    """A training that is open: `open_run` makes it, on every rank."""

    recipe: Recipe
    options: RunOptions
    world: World
    layout: Layout
    datasets: Datasets
    plan: TrainingPlan
    trainer: Trainer
    position: Position
    """the position at which the run was opened, with its last evaluation"""
    folder: RunFolder | None = None
    """the run folder for its checkpoints; a run without a folder saves nothing"""
    lock: FolderLock | None = None
    """the lock of the folder, on rank 0"""
    evaluates_on: torch.device | None = None
    """device of evaluations beside the training; None = all ranks evaluate together, between two steps"""
    compiled: Sequence[str] = ()
    """the parts of the detector that are compiled"""
    writer: CheckpointWriter | None = None
    """writes its checkpoints, on rank 0"""

    def __post_init__(self) -> None:
        self._saved_step = self.first_step
        self.faults = LoadingFaults()
        """faults in loading images on this rank that were mended, until they are taken"""
        self._clock = time.perf_counter()

    @property
    def has_faults(self) -> bool:
        """Whether this rank has survived faults that were not taken yet."""
        return bool(self.faults) or self.trainer.pieces.repeated > 0

    @property
    def first_step(self) -> int:
        """The number of steps done before the run was opened."""
        return self.position.step

    @property
    def last_step(self) -> int:
        """The number of steps of the whole run."""
        return total_steps(self.recipe, self.plan.num_images)

    @cached_property
    def stops(self) -> Stops:
        """What the run does after which step."""
        return stops_of(self.plan, self.recipe, self.last_step)

    def scheduled_rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ...: that of the recipe, or less for some time after a roll-back."""
        scheduled, position = learning_rate(self.recipe, self.plan.num_images, step), self.position
        return scheduled * rewarm_factor(self.recipe, step, position.roll_backs, position.rolled_back_to)

    def steps(
        self,
        first: int,
        last: int,
        rate_of: Callable[[int], float] | None = None,
        notes: Callable[[], Sequence[bool]] | None = None,
    ) -> Iterator[StepResult]:
        """Make the steps `first` to `last` - 1, on every rank; each is made when its result is asked for.

        `rate_of` replaces the learning rate of the recipe; `notes` are those of `train_step`. The time that the caller
        spends on a result counts for the next step, because it may wait for the device there; `restart_clock` leaves
        out other work. Raises InputError for an image that cannot be read, and if a micro-batch does not fit the
        device.
        """
        layout, rank, groups = self.layout, self.world.rank, self.layout.groups_of(self.world.rank)
        batches = training_batches(
            self.datasets.train,
            self.plan,
            layout,
            rank,
            (first, last),
            workers=self.options.workers,
            device=self.world.device,
            faults=self.faults,
        )
        self.restart_clock()
        for step in range(first, last):
            waiting, again = Waiting(batches), None if self.compiled else partial(self._loaded_again, step)
            rate = (rate_of or self.scheduled_rate)(step)
            try:
                own = islice(waiting, len(groups))
                result = train_step(self.trainer, own, groups, rate, step, self.world, notes, again)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise InputError(
                    f"a micro-batch of {layout.largest_share} images does not fit {self.world.device}: use more "
                    "devices, --max-images-per-device, a smaller bn_size or smaller data.short_edges"
                ) from None
            before, self._clock = self._clock, time.perf_counter()
            yield replace(result, seconds=self._clock - before, data_seconds=waiting.seconds)

    def _loaded_again(self, step: int) -> Iterator[Batch]:
        """The micro-batches of a step again; faults in their images were counted already."""
        rank, device = self.world.rank, self.world.device
        steps = step, step + 1
        return training_batches(
            self.datasets.train, self.plan, self.layout, rank, steps, workers=0, device=device, faults=LoadingFaults()
        )

    def restart_clock(self) -> None:
        """Start the time of the next step now."""
        self._clock = time.perf_counter()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the training images' names, sizes, boxes, masks and weights."""
        return fingerprint(self.datasets.train)

    @cached_property
    def val_fingerprint(self) -> str:
        """The same of the validation images."""
        return fingerprint(self.datasets.val)

    def state(self, step: int) -> RunState:
        """The state in the checkpoint after so many steps, besides its tensors."""
        train, position = self.datasets.train, self.position
        return RunState(
            step=step,
            class_names=train.class_names,
            category_ids=train.category_ids,
            num_images=len(train),
            data=self.fingerprint,
            val_data=self.val_fingerprint,
            evaluation=None if position.numbers is None else position.numbers.as_dict(),
            evaluated_step=position.evaluated_step,
            best_score=position.best_score,
            best_step=position.best_step,
            roll_backs=position.roll_backs,
            rolled_back_to=position.rolled_back_to,
        )

    def save(
        self,
        step: int,
        needed: Collection[int] = (),
        first: Callable[[], None] | None = None,
        look: Callable[[Tensors], None] | None = None,
    ) -> None:
        """Save a checkpoint; every rank calls it, and none waits for another.

        Rank 0 copies the state, and a thread writes it; closing the run waits for it. The checkpoints of the steps in
        `needed` are not deleted; `first` is called, and `look` gets the copy, before the checkpoint is written.
        """
        if self.folder is None:
            raise ValueError("a run without a folder has no checkpoints")
        self._saved_step = step
        self.check_folder()
        if self.writer is not None:
            self.writer.save(self.state(step), self.trainer.state(), self._spared(needed), first, look)

    @property
    def kept_step(self) -> int:
        """The step of the newest checkpoint on the disk, 0 for none; rank 0 waits for what is being written.

        The other ranks assume that it is the last one saved.
        """
        if self.writer is None:
            return self._saved_step
        self.writer.wait()
        return self.writer.saved_step

    def checkpoint_failures(self, *, waits: bool = False) -> Sequence[str]:
        """Sentences on what could not be written since the last call, on rank 0; `waits` for all checkpoints first.

        Raises InputError if something could not be written and the run has no checkpoint.
        """
        if self.writer is None:
            return ()
        if waits:
            self.writer.wait()
        return self.writer.failures()

    def delete_old_checkpoints(self, needed: Collection[int] = ()) -> None:
        """Delete the checkpoints that the recipe does not keep, but not those of the steps in `needed`."""
        if self.writer is not None:
            self.writer.delete_old(self._spared(needed))

    def _spared(self, needed: Collection[int]) -> set[int]:
        """The steps whose checkpoints are kept at any age."""
        every, best = self.recipe.keep_every_epochs, self.position.best_step
        epochs = range(every, int(self.plan.epochs_done(self.last_step)) + 1, every) if every else ()
        is_back, folder = self.recipe.watch.action == "roll_back", self.folder
        backs = kept_to_go_back(folder, self.stops, self._saved_step) if is_back and folder is not None else ()
        return {*needed, *backs, *map(self.plan.epoch_end, epochs), *([best] if self.recipe.keep_best else [])}

    def check_folder(self) -> None:
        """Raise InputError if the folder was moved or deleted."""
        if self.lock is not None:
            self.lock.check()

    def evaluated(self, step: int, numbers: Evaluation, then: Callable[[], None] | None = None) -> None:
        """Note an evaluation, as the last if no later step is evaluated; rank 0 writes it into the checkpoints.

        `then` is called once it is in them.
        """
        self.position = position = self.position.evaluated(step, numbers)
        if self.folder is not None and self.writer is not None:
            mark = partial(mark_evaluated, self.folder, step, numbers, position, self.val_fingerprint)
            self.writer.later(mark, then)


@contextmanager
def open_run(
    recipe: Recipe,
    world: World,
    options: RunOptions | None = None,
    folder: RunFolder | None = None,
    datasets: Datasets | None = None,
    start: Path | None = None,
    *,
    is_new: bool = True,
) -> Iterator[Run]:
    """Prepare a training, from the folder's newest checkpoint if it has one; every rank calls it.

    The ranks check that they start from the same place. The folder is locked until the run is closed.

    Args:
        recipe: what is trained.
        world: all ranks.
        options: options of this machine.
        folder: the run folder; without one the run starts from the beginning and saves nothing.
        datasets: the data sets of the recipe, if they have been read before.
        start: without a folder, the checkpoint to start from; nothing is written.
        is_new: false where steps of a run that exists are made again: as for a run that goes on, nothing is refused
            that earlier versions trained.

    Raises:
        InputError: everything that a user can mend, before the first step.
    """
    options = options or RunOptions()
    layout = recipe_layout(recipe, world.size, options.lane_width, options.max_images_per_device)
    compare_commands(recipe, {name: own for name, own in asdict(options).items() if name != "workers"}, world)
    beside = agree_on_device(options.evaluate_in_background, options.evaluate_on, world)
    if options.compile:
        check_compiler(recipe, world.device)
    if folder is not None:
        own_folder = folder
        world.on_first(lambda: check_folder(own_folder, recipe))
    is_resumed = start is not None or (folder is not None and newest_step(folder, world) is not None)
    is_new = is_new and not is_resumed
    if is_new:
        check_new_recipe(recipe)
    if not is_resumed:
        world.on_first(lambda: check_sources(recipe))
    datasets = datasets or load_datasets(recipe, world)
    compare_data(datasets, world)
    plan = training_plan(datasets.train, recipe)
    check_statistics(recipe, plan, datasets.train)
    trainer = make_trainer(recipe, datasets.train.class_names, layout, world, is_resumed=is_resumed, is_new=is_new)
    with ExitStack() as opened:
        if trainer.apart is not None:
            opened.enter_context(operations_on_one_thread())
        lock, writer, position = None, None, Position()
        if folder is not None:
            lock = claim_folder(folder, recipe, world, facts_of_training(trainer.model, plan))
            if lock is not None:
                opened.callback(lock.close)
            position = without_other_scores(resume(trainer, folder, datasets.train, world), datasets.val)
            if world.is_first:
                writer = CheckpointWriter(folder, recipe.keep_checkpoints, position.step)
                opened.push(writer.leave)
        elif start is not None:
            position = start_at(trainer, start, datasets.train, world)
        compare_states(trainer, position.step, world)
        compiled = compile_dense(trainer.model, warns=world.is_first) if options.compile else []
        if not compiled:  # the compiler decides what a compiled part keeps for the backward
            trial = MemoryTrial(trainer, plan, datasets.train, world)
            layout, change = trial.fitting(layout, options.lane_width, options.max_images_per_device)
            position = replace(position, warnings=(*position.warnings, *([change] if change else [])))
        place = (position, folder, lock, beside, compiled, writer)
        yield Run(recipe, options, world, layout, datasets, plan, trainer, *place)
