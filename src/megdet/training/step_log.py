"""The numbers of the steps: read from the device for several steps together, checked, written to metrics.jsonl."""

import math
import time
from collections.abc import Sequence
from typing import Any

from megdet.errors import DivergedError
from megdet.run_folder.metrics import MetricsWriter, read_metrics
from megdet.training.epoch_means import EpochMeans
from megdet.training.report import Reporter
from megdet.training.run import Run
from megdet.training.schedule import why_no_warmup
from megdet.training.step import StepResult, read_results

READ_EVERY = 20
"""Steps whose numbers are read from the device together."""
READ_SECONDS = 10.0
"""The longest time between two reads, where READ_EVERY steps take longer."""


class StepLog:
    """Takes the results of steps; every rank has one.

    Args:
        run: the run of the steps.
        reporter: gets every step.
        metrics: on rank 0; None on the other ranks.
    """

    def __init__(self, run: Run, reporter: Reporter, metrics: MetricsWriter | None) -> None:
        self.run, self.reporter, self.metrics = run, reporter, metrics
        self.means = EpochMeans(run.plan, [] if metrics is None else _steps_done(metrics))
        self._unread: list[StepResult] = []
        self._last_read = time.perf_counter()

    def add(self, result: StepResult, *, reads: bool = False) -> bool:
        """Take a result; returns whether all numbers so far have been read. `reads` forces it.

        Raises DivergedError if a loss or the gradient of one of these steps is not finite.
        """
        self._unread.append(result)
        is_due = len(self._unread) == READ_EVERY or time.perf_counter() - self._last_read >= READ_SECONDS
        if not (reads or is_due):
            return False
        unread, self._unread = self._unread, []
        self._last_read = time.perf_counter()
        self._read(unread)
        return True

    def sync(self) -> None:
        """Flush what has been read to the disk. Raises InputError."""
        if self.metrics is not None:
            self.metrics.sync()

    def _read(self, results: Sequence[StepResult]) -> None:
        self.run.check_folder()
        lines = []
        for result, numbers in zip(results, read_results(results, self.run.trainer), strict=True):
            self._check(result, numbers)
            step = result.step + 1
            line = {
                "step": step,
                "epoch": round(self.run.plan.epochs_done(step), 6),
                "learning_rate": result.rate,
                **numbers,
                "seconds": round(result.seconds, 6),
                "data_seconds": round(result.data_seconds, 6),
            }
            if self.metrics is not None:
                self.metrics.write(line)
                if ended := self.means.add(line):
                    self.metrics.write(ended)
                    self.reporter.epoch_ended(ended["epoch_means"])
            lines.append(line)
        self.reporter.steps(lines)

    def _check(self, result: StepResult, numbers: dict[str, Any]) -> None:
        watched = {name: numbers[name] for name in (*result.means, "gradient_norm")}
        if math.isfinite(numbers["loss"]) and math.isfinite(numbers["gradient_norm"]):
            return
        worst = next((name for name, value in watched.items() if not math.isfinite(value)), "loss")
        warmup = "lower schedule.warmup_start" if why_no_warmup(self.run.recipe) else "lengthen schedule.warmup_steps"
        kept = self.run.kept_step
        left = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint had been written yet"
        raise DivergedError(
            f"step {result.step + 1}: {worst} is not finite (learning rate {result.rate:.4g}): lower "
            f"optimizer.base_lr, {warmup} or set optimizer.clip_norm; {left}"
        )


def _steps_done(metrics: MetricsWriter) -> list[dict[str, Any]]:
    return [line for line in read_metrics(metrics.path) if "loss" in line]
