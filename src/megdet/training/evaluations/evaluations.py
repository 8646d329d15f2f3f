"""The evaluations of a run and their files: made by all ranks together, or by a process beside them."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from megdet.data.classes import category_ids_for
from megdet.errors import InputError, TooLittleMemoryError
from megdet.evaluation.coco_numbers import Evaluation, evaluate_detections
from megdet.files import write_json_atomically
from megdet.inference.predict import detect_dataset
from megdet.inference.trained import load_detector
from megdet.model.detector import Detector
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter
from megdet.training.evaluations.background import BackgroundEvaluations
from megdet.training.ledger import RunLedger
from megdet.training.report import Reporter
from megdet.training.run import Run

_WAIT_SECONDS = 5.0
"""Seconds that rank 0 waits for an evaluation between two collectives, so that the other ranks do not time out."""


@dataclass
class Evaluations:
    """Makes the evaluations of a run and writes them to its folder; every rank calls the same methods.

    With evaluations in the background, only rank 0 knows the last one before `finish`.
    """

    run: Run
    folder: RunFolder
    reporter: Reporter
    metrics: MetricsWriter | None
    """None on the other ranks"""
    background: BackgroundEvaluations | None
    """only on rank 0, and only if evaluations are made in the background"""
    ledger: RunLedger

    def __post_init__(self) -> None:
        self.world, self._has_said_to_wait = self.run.world, False
        self._to_make_up: list[int] = []

    @property
    def is_background(self) -> bool:
        """Whether evaluations are made beside the training; the same on every rank."""
        return self.run.evaluates_on is not None

    @property
    def needed_checkpoints(self) -> list[int]:
        """The steps whose checkpoints are still to be evaluated."""
        return [*self._to_make_up, *([] if self.background is None else self.background.steps)]

    def due(self, step: int) -> None:
        """Evaluate the step that was just done; in the background the checkpoint must be written already."""
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
        """Evaluate the checkpoints of these steps, which an earlier start of the run did not evaluate."""
        self._to_make_up = list(steps)
        while self._to_make_up:
            step = self._to_make_up.pop(0)  # the others' checkpoints stay meanwhile
            if self.is_background or step == self.run.first_step:
                self.due(step)
            else:
                self._evaluate(step, load_detector(self.folder, self.world.device, step=step, world=self.world).model)

    def look(self) -> None:
        """Write down the background evaluations that are done, without waiting.

        Raises InputError on rank 0 if one has failed.
        """
        while (
            self.background is not None
            and (found := self.background.poll(self.run.position.evaluated_step)) is not None
        ):
            self._write_down(found.step, found.numbers, found.seconds)

    def finish(self) -> None:
        """Wait until all evaluations are done; then every rank knows the last one."""
        is_over = not self.is_background
        if waiting := self.needed_checkpoints:
            self.reporter.say(f"every step is done; waiting for the evaluation of step {', '.join(map(str, waiting))}")
        while not is_over:
            if self.background is not None:
                self.look()
                self.background.wait(min(_WAIT_SECONDS, self.world.timeout.total_seconds() / 4))
                self.look()
            is_over, self.run.position = self.world.on_first(lambda: (not self.needed_checkpoints, self.run.position))

    def _evaluate_averages(self, step: int) -> None:
        """Evaluate the trained model, with the averaged weights if the run has them."""
        model, averages = self.run.trainer.model, self.run.trainer.averages
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()} if averages else None
        if averages is not None:
            model.load_state_dict(averages.tensors)
        self._evaluate(step, model)
        if own is not None:
            model.load_state_dict(own)
        model.train()

    def _evaluate(self, step: int, model: Detector) -> None:
        self.reporter.evaluating(step)
        started, recipe, datasets = time.perf_counter(), self.run.recipe, self.run.datasets
        val = datasets.val
        ids = category_ids_for(datasets.train.class_names, val)
        try:
            results = detect_dataset(model, recipe, val, ids, self.world, workers=self.run.options.workers)
        except TooLittleMemoryError as error:
            raise InputError(f"the evaluation of step {step}: {error}") from None
        numbers = self.world.on_first(
            lambda: evaluate_detections(val.annotations_file, results, has_masks=model.has_masks)
        )
        if step >= self.run.position.evaluated_step:
            self.world.on_first(lambda: write_json_atomically(self.folder.detections, results))
        self._write_down(step, numbers, time.perf_counter() - started)

    def _write_down(self, step: int, numbers: Evaluation, seconds: float) -> None:
        """Write an evaluation; files and ledger are of the latest step, though an earlier one may be made up later."""
        is_latest = step >= self.run.position.evaluated_step
        if self.metrics is not None:
            self.metrics.write({"step": step, "evaluation": numbers.totals(), "seconds": round(seconds, 3)})
            self.metrics.sync()  # before the checkpoint knows it, after which it is not made again
            if is_latest:
                write_json_atomically(self.folder.evaluation, numbers.as_dict(), indent=2)
        # after the checkpoint knows it: until then a new start takes it out of metrics.jsonl and makes it again
        self.run.evaluated(step, numbers, self.ledger.evaluation_line(step, numbers.totals()) if is_latest else None)
        self.run.delete_old_checkpoints(self.needed_checkpoints)  # such as the best until now
        self.reporter.evaluated(step, numbers, seconds)
