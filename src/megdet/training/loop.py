"""The training run: open, step, look, evaluate, save."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

from megdet.distributed.failures import stop_together
from megdet.distributed.termination import TerminationListener
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import LeftBehindError
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter
from megdet.training.agreement import Agreement
from megdet.training.evaluations.background import BackgroundEvaluations, overrides_beside
from megdet.training.evaluations.evaluations import Evaluations
from megdet.training.fault_log import FaultLog
from megdet.training.ledger import RunLedger
from megdet.training.position import mark_rolled_back, newest_checkpoint
from megdet.training.report import Reporter
from megdet.training.run import Run, RunOptions, open_run
from megdet.training.step_log import StepLog
from megdet.training.trackers.trackers import check_trackers

_MAKE_ROOM = "make room on the disk of the run folder, then run it again"


def train(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> Evaluation:
    """Train from the newest checkpoint of the folder, or from the start, to the end; returns the last evaluation.

    Every rank calls it. Raises InputError for everything a user can mend, before the first step where possible; an
    error on one rank stops all ranks. After SIGTERM, SIGUSR1 or Ctrl-C on any rank, all ranks save after the same step
    and raise StoppedError; outside the steps, where nothing would be lost, at once. If the training diverges,
    `watch.action` says what happens; DivergedError if it is to stop.
    """
    with stop_together(world, heeds_signals=True) as signals:
        while True:
            try:
                return _train(recipe, folder, options, world, signals)
            except _WentBackError:
                continue  # like a new start, from the checkpoint in which the roll-back is noted


class _WentBackError(Exception):
    """The run diverged and must go on from an earlier checkpoint; all ranks raise it after the same step."""


def _train(
    recipe: Recipe, folder: RunFolder, options: RunOptions, world: World, signals: TerminationListener
) -> Evaluation:
    if recipe.trackers:
        world.on_first(lambda: check_trackers(recipe.trackers))
    with (
        open_run(recipe, world, options, folder) as run,
        _watched(run, folder) as observers,
    ):
        stops, evaluations, reporter = run.stops, observers.evaluations, observers.log.reporter
        agreed = Agreement(world, signals, 60 * recipe.checkpoint_minutes, lambda: run.has_faults)
        for warning in run.position.warnings:
            reporter.say(warning)
        evaluations.make_up(step for step in run.position.unevaluated if stops.after(step).is_evaluated)
        with signals.heeded():
            for result in run.steps(run.first_step, run.last_step, notes=agreed.own):
                step, stop = result.step + 1, stops.after(result.step + 1)
                agreed.read(result)
                is_stopped, is_last = agreed.signal is not None, step == run.last_step
                is_saved = stop.is_saved or agreed.is_save_due or is_stopped
                is_noted = is_saved or observers.ledger.is_due(step)
                if agreed.are_faults_known or is_saved:
                    observers.faults.gather(step)
                is_read = observers.log.add(result, reads=step in stops or is_noted or agreed.is_end_due)
                agreed.has_diverged = observers.log.divergence is not None
                have_all_read = observers.log.reads_at_once or step in stops or is_noted
                if agreed.is_end_due or (agreed.has_diverged and have_all_read):
                    _leave(run, observers.log)
                if is_saved:
                    observers.save(step)
                    agreed.saved()
                elif is_noted:
                    observers.note(step)
                for failure in run.checkpoint_failures(waits=is_stopped or is_last or stop.is_evaluated):
                    reporter.say(failure)
                if is_stopped:
                    raise agreed.error(_what_is_kept(run, step))
                if is_last and run.kept_step != step:
                    raise InputError(f"every step is done, but the last checkpoint is not saved: {_MAKE_ROOM}")
                if is_read:
                    _look(observers, step, is_saved=is_saved)
                if stop.is_evaluated and (run.evaluates_on is None or run.kept_step == step):
                    with signals.heeded(False):
                        evaluations.due(step)
                if step in stops or is_noted:
                    run.restart_clock()
        evaluations.finish()
        reporter.say(observers.log.outcome())
        if sentence := run.world.on_first(observers.ledger.finish):
            reporter.say(sentence)
        observers.faults.tell()
    if run.position.numbers is None:
        raise InputError(f"{folder.path}: the run is over but has no evaluation: run `megdet evaluate {folder.path}`")
    return run.position.numbers


def _leave(run: Run, log: StepLog) -> NoReturn:
    """End the run, which diverged, or let it go back to its newest checkpoint that the recipe asked for.

    One of the clock or of a stop would make the result depend on them. Raises DivergedError, if `watch.action` is not
    to go back, without such a checkpoint, or after too many roll-backs.
    """
    found, folder, watch = log.divergence, run.folder, run.recipe.watch
    assert found is not None, "all ranks have read the same steps"
    assert folder is not None, "only runs with a folder are judged"
    if watch.action != "roll_back":
        raise log.failure(found)
    # kept_step waits for what is being written
    to = run.world.on_first(lambda: run.kept_step and newest_checkpoint(folder, run.stops.is_saved_after))
    if not to:
        why = "there is no checkpoint of an epoch or of checkpoint_steps to go back to"
        raise log.failure(replace(found, why=f"{found.why}, and {why}"))
    if run.position.roll_backs >= watch.most_roll_backs:
        raise log.failure(replace(found, why=f"{found.why}, after {run.position.roll_backs} roll-backs"))
    log.note_roll_back(found, to)
    if left := run.world.on_first(lambda: _mark(folder, to, run.position.roll_backs + 1)):
        log.reporter.say(left)
    raise _WentBackError


def _mark(folder: RunFolder, to: int, roll_backs: int) -> str:
    """Mark a roll-back; returns what to say of a later checkpoint that cannot be deleted, but is out of the way."""
    try:
        mark_rolled_back(folder, to, roll_backs)
    except LeftBehindError as error:
        if newest_checkpoint(folder, lambda _: True) > to:  # the run would go on from it, diverge and come here again
            raise
        return str(error)
    return ""


def _what_is_kept(run: Run, step: int) -> str:
    kept = run.kept_step
    if kept == step:
        return f"step {step} of {run.last_step} is saved, the same command goes on from there"
    return f"step {step} of {run.last_step} is not saved, the same command goes on from step {kept}: {_MAKE_ROOM}"


@dataclass(frozen=True)
class _Observers:
    run: Run
    log: StepLog
    evaluations: Evaluations
    faults: FaultLog
    ledger: RunLedger

    def save(self, step: int) -> None:
        """Save a checkpoint, and its line of the ledger before."""
        self.run.save(step, self.evaluations.needed_checkpoints, self.log.sync, self.ledger.line_of(step))
        self.ledger.noted(step, is_saved=True)

    def note(self, step: int) -> None:
        """Write a line of the ledger without a checkpoint."""
        write = self.ledger.line_of(step)
        if self.run.writer is not None and write is not None:
            self.run.writer.look_at_copy(self.run.trainer.state(), write)
        self.ledger.noted(step, is_saved=False)


@contextmanager
def _watched(run: Run, folder: RunFolder) -> Iterator[_Observers]:
    """The observers of an open run: its reports, its metrics and its evaluations."""
    world, options = run.world, run.options
    with ExitStack() as opened:
        reporter = opened.enter_context(Reporter(run, folder))
        if run.compiled:
            reporter.say(f"compiled in the first step of each canvas: {', '.join(run.compiled)}")
        metrics, background = None, None
        if world.is_first:
            position = run.position
            writer = MetricsWriter(folder.metrics, run.first_step, position.unevaluated, position.roll_backs)
            metrics = opened.enter_context(writer)
        if run.evaluates_on is not None and world.is_first:
            overrides, slow = overrides_beside(run.recipe, run.evaluates_on, world.device)
            background = BackgroundEvaluations(folder, run.evaluates_on, options.workers, world.device, overrides)
            opened.callback(background.close)
            note = f", in float32, since bfloat16 is slow there: {slow}" if slow else ""
            reporter.say(f"evaluations go on beside the training, on {run.evaluates_on}{note}")
        ledger = RunLedger(run, folder, reporter.say)
        opened.callback(ledger.close)
        evaluations = Evaluations(run, folder, reporter, metrics, background, ledger)
        faults = FaultLog(run, folder, reporter, metrics)
        yield _Observers(run, StepLog(run, reporter, metrics, ledger), evaluations, faults, ledger)


def _look(observers: _Observers, step: int, *, is_saved: bool = False) -> None:
    """Check the evaluations beside the training; if one has failed, save the run and stop it."""
    try:
        observers.evaluations.look()
    except InputError:
        if not is_saved and observers.log.divergence is None:
            observers.save(step)
        raise
