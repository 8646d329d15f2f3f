"""The numbers of the steps: read from the device for several steps together, checked, written to metrics.jsonl."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megdet.data.plan import TrainingPlan
from megdet.errors import DivergedError
from megdet.memory import peak_bytes
from megdet.run_folder.metrics import MetricsWriter, read_metrics
from megdet.training.epoch_means import EpochMeans
from megdet.training.ledger import RunLedger
from megdet.training.report import Reporter
from megdet.training.run import Run
from megdet.training.schedule import why_no_warmup
from megdet.training.step import StepResult, read_results

READ_EVERY = 20
"""Number of steps whose results are read from the device together; on a CPU each step is read at once."""
READ_SECONDS = 10.0
"""The longest time in seconds between two reads, if READ_EVERY steps take longer."""


class StepLog:
    """Takes the results of steps; every rank has one.

    Args:
        run: the run of the steps.
        reporter: gets every step.
        metrics: on rank 0; None on the other ranks.
        ledger: gets the lines of metrics.
    """

    def __init__(self, run: Run, reporter: Reporter, metrics: MetricsWriter | None, ledger: RunLedger) -> None:
        self.run, self.reporter, self.metrics, self.ledger = run, reporter, metrics, ledger
        records = [] if metrics is None else read_metrics(metrics.path)
        self.means = EpochMeans(run.plan, [record for record in records if "loss" in record])
        reporter.remember(records)
        self.num_left_out = int(run.trainer.watch.num_left_out)
        """updates of the whole run that were left out, in the steps read so far"""
        self.divergence: Divergence | None = None
        """the divergence for which the run must end or go back; nothing is read after it"""
        self._unread: list[StepResult] = []
        self._last_read = time.perf_counter()

    @property
    def reads_at_once(self) -> bool:
        """Whether every rank reads each step when it is done: on a CPU, where there is no device to wait for."""
        return self.run.world.device.type == "cpu"

    def add(self, result: StepResult, *, reads: bool = False) -> bool:
        """Take a result; returns whether all numbers so far have been read. `reads` forces it."""
        self._unread.append(result)
        is_due = len(self._unread) == READ_EVERY or time.perf_counter() - self._last_read >= READ_SECONDS
        if not (reads or is_due or self.reads_at_once):
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
        if self.divergence is not None:
            return
        lines = []
        peak = peak_bytes(self.run.world.device)
        for result, numbers in zip(results, read_results(results, self.run.trainer), strict=True):
            if (why := numbers.get("left_out")) and self._is_left_for(result, why):
                break
            line = {
                **line_of_step(result, numbers, self.run.plan),
                "seconds": round(result.seconds, 6),
                "data_seconds": round(result.data_seconds, 6),
                **({} if peak is None else {"peak_memory_bytes": peak}),
            }
            if self.metrics is not None:
                self.metrics.write(line)
                self.ledger.add(line)
                if ended := self.means.add(line):
                    self.metrics.write(ended)
                    self.reporter.epoch_ended(ended["epoch_means"])
            lines.append(line)
        self.reporter.steps(lines)

    def _is_left_for(self, result: StepResult, why: str) -> bool:
        """Whether the run ends or goes back for a step whose update was left out; else it is told of.

        Other ranks may not have read it yet, so `divergence` is acted upon when all have.
        """
        watch, step = self.run.recipe.watch, result.step + 1
        if watch.action == "skip" and self.num_left_out < watch.most_skipped:
            self.num_left_out += 1
            count = f"{self.num_left_out} of at most {watch.most_skipped}"
            self.reporter.say(f"step {step}: {why}: its update is left out ({count}); {self._look_at(step)}")
            return False
        after = f", after {watch.most_skipped} updates were left out" if watch.action == "skip" else ""
        self.divergence = Divergence(result, f"{why}{after}")
        return True

    def failure(self, divergence: "Divergence") -> DivergedError:
        """The exception that ends the run at a step."""
        recipe, kept, result = self.run.recipe, self.run.kept_step, divergence.result
        warmup = "lower schedule.warmup_start" if why_no_warmup(recipe) else "lengthen schedule.warmup_steps"
        left = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint had been written yet"
        return DivergedError(
            f"step {result.step + 1}: {divergence.why}: the run failed (learning rate {result.rate:.4g}): lower "
            f"optimizer.base_lr, {warmup}, set optimizer.clip_norm or choose another watch.action; {left}; "
            f"{self._look_at(result.step + 1)}",
            result.step + 1,
            divergence.why,
        )

    def _look_at(self, step: int) -> str:
        return f"to look at it: megdet replay {shlex.quote(str(self.reporter.folder.path))} --step {step}"

    def note_roll_back(self, divergence: "Divergence", to: int) -> None:
        """Write to the metrics, on the disk, that the run goes back to the checkpoint of step `to`, and print it."""
        step, recipe, count = divergence.result.step + 1, self.run.recipe, self.run.position.roll_backs + 1
        if self.metrics is not None:
            self.metrics.write({"step": to, "rolled_back": {"from": step, "why": divergence.why}})
            self.metrics.sync()
        self.reporter.say(
            f"step {step}: {divergence.why}: the run goes back to the checkpoint of step {to} ({count} of at most "
            f"{recipe.watch.most_roll_backs}); {self._look_at(step)} --roll-backs {count - 1}"
        )

    def outcome(self) -> str:
        """How a run ended that has made its last step, in one line."""
        skipped, back = self.num_left_out, self.run.position.roll_backs
        if not skipped and not back:
            return "every update was applied"
        times = f"{skipped + back} time{'s' if skipped + back > 1 else ''}"
        return f"recovered {times} (updates left out: {skipped}, roll-backs: {back})"


def line_of_step(result: StepResult, numbers: Mapping[str, Any], plan: TrainingPlan) -> dict[str, Any]:
    """A step's line of metrics.jsonl, without what belongs to the machine: it is the same whenever the step is made."""
    step = result.step + 1
    return {"step": step, "epoch": round(plan.epochs_done(step), 6), "learning_rate": result.rate, **numbers}


@dataclass(frozen=True)
class Divergence:
    """A step whose update the watch has left out."""

    result: StepResult
    why: str
