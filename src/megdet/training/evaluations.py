"""The evaluations of a run and what each leaves behind: made by all ranks together, or by a process beside them."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from megdet.distributed.world import World
from megdet.evaluation.coco_numbers import CocoNumbers, evaluate_detections
from megdet.files import write_json_atomically
from megdet.inference.predict import category_ids_for, detect_dataset
from megdet.inference.trained import load_detector
from megdet.journal.checkpoint_files import checkpoint_step, checkpoints, delete_old_checkpoints, update_state
from megdet.journal.metrics import MetricsWriter
from megdet.journal.run_folder import RunFolder
from megdet.journal.run_state import RunState
from megdet.model.detector import Detector
from megdet.recipe import Recipe
from megdet.training.background import BackgroundEvaluations
from megdet.training.prepare import Datasets, Resumed
from megdet.training.report import Reporter
from megdet.training.step import Trainer

_WAIT_SECONDS = 5.0
"""Of rank 0 for an evaluation, between two words to the other ranks, whose patience has a limit."""


@dataclass
class Evaluations:
    """Makes the evaluations of a run and writes them down; every rank has one and calls the same methods.

    In the background only rank 0 knows `numbers` and `evaluated_step` before `finish`.
    """

    recipe: Recipe
    folder: RunFolder
    world: World
    datasets: Datasets
    trainer: Trainer
    reporter: Reporter
    metrics: MetricsWriter | None
    """on rank 0"""
    resumed: Resumed
    workers: int
    is_background: bool
    """the same on every rank"""
    background: BackgroundEvaluations | None
    """on rank 0, where they are in the background"""

    def __post_init__(self) -> None:
        self.numbers, self.evaluated_step = self.resumed.numbers, self.resumed.evaluated_step
        self._has_said_to_wait = False

    @property
    def needed_checkpoints(self) -> list[int]:
        """The steps whose checkpoints are still to be evaluated."""
        return [] if self.background is None else self.background.steps

    def state(self, step: int) -> RunState:
        """What the checkpoint of this step says besides its tensors."""
        return RunState(
            step=step,
            class_names=self.datasets.train.class_names,
            category_ids=self.datasets.train.category_ids,
            num_images=len(self.datasets.train),
            data=self.resumed.fingerprint,
            evaluation=None if self.numbers is None else self.numbers.as_dict(),
            evaluated_step=self.evaluated_step,
        )

    def due(self, step: int) -> None:
        """Evaluate the step that was just done; in the background it starts or waits, and its checkpoint is written."""
        if not self.is_background:
            self._evaluate_averages(step)
        if self.background is not None:
            self.background.start(step)
            before = self.background.steps[0]
            if before != step and not self._has_said_to_wait:
                self._has_said_to_wait = True
                self.reporter.say(
                    f"the evaluation of step {step} waits for that of step {before}: they take longer than the "
                    "training between them; a checkpoint stays until it is evaluated"
                )

    def make_up(self, steps: Iterable[int]) -> None:
        """Evaluate the kept checkpoints of these steps, which an earlier start of the run did not come to."""
        for step in steps:
            if self.is_background or step == self.resumed.step:
                self.due(step)
            else:
                self._evaluate(step, load_detector(self.folder, self.world.device, step=step, world=self.world).model)

    def look(self) -> None:
        """Write down the evaluations in the background that are done; never waits.

        Raises InputError on rank 0 where one has failed.
        """
        while self.background is not None and (found := self.background.poll()) is not None:
            self._write_down(found.step, found.numbers, found.seconds)
            delete_old_checkpoints(self.folder, self.recipe.keep_checkpoints, self.background.steps)

    def finish(self) -> None:
        """Wait until all evaluations are done; then every rank knows the numbers of the last."""
        is_over = not self.is_background
        if waiting := self.needed_checkpoints:
            self.reporter.say(f"every step is done; waiting for the evaluation of step {', '.join(map(str, waiting))}")
        while not is_over:
            if self.background is not None:
                self.look()
                self.background.wait(min(_WAIT_SECONDS, self.world.timeout.total_seconds() / 4))
                self.look()
            is_over, self.numbers, self.evaluated_step = self.world.gather_objects(
                (not self.needed_checkpoints, self.numbers, self.evaluated_step)
            )[0]

    def _evaluate_averages(self, step: int) -> None:
        """Evaluate the trained model, with the averages as its weights where the run keeps them."""
        model, averages = self.trainer.model, self.trainer.averages
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()} if averages else None
        if averages is not None:
            model.load_state_dict(averages.tensors)
        self._evaluate(step, model)
        if own is not None:
            model.load_state_dict(own)
        model.train()

    def _evaluate(self, step: int, model: Detector) -> None:
        started = time.perf_counter()
        val = self.datasets.val
        ids = category_ids_for(self.datasets.train.class_names, val)
        results = detect_dataset(model, self.recipe, val, ids, self.world, workers=self.workers)
        own_numbers = evaluate_detections(val.annotations_file, results) if self.world.is_first else None
        numbers: CocoNumbers = self.world.gather_objects(own_numbers)[0]
        if self.world.is_first:
            write_json_atomically(self.folder.detections, results)
        self._write_down(step, numbers, time.perf_counter() - started)

    def _write_down(self, step: int, numbers: CocoNumbers, seconds: float) -> None:
        self.numbers, self.evaluated_step = numbers, step
        if self.metrics is not None:
            of_all = {key: value for key, value in numbers.as_dict().items() if key != "per_class"}
            self.metrics.write({"step": step, "evaluation": of_all, "seconds": round(seconds, 3)})
            write_json_atomically(self.folder.evaluation, numbers.as_dict(), indent=2)
            for path in checkpoints(self.folder):
                if checkpoint_step(path) >= step:  # later ones were written while this evaluation went on
                    update_state(path, self.state(checkpoint_step(path)))
        self.reporter.evaluated(step, numbers, seconds)
