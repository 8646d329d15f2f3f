"""Trains while processes are killed, starting again by the same command, and compares with an undisturbed run."""

import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from megdet.contract.chaos.command import Command
from megdet.contract.chaos.comparison import compare
from megdet.contract.chaos.disturbances import Disturbance, disturbances
from megdet.contract.chaos.findings import Findings, Finished
from megdet.contract.chaos.progress import Watched
from megdet.contract.chaos.start import LOOK_SECONDS, HangError, Start, Times
from megdet.distributed.layout import recipe_layout
from megdet.errors import InputError
from megdet.files import write_text_atomically
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_length import decay_of

KILLS = 50
DEVICES = (2,)
TIMEOUT = timedelta(minutes=0.5)
"""How long a rank waits for a stopped rank; a training waits 30 minutes by default."""


def chaos(
    recipe: Recipe,
    kills: int = KILLS,
    devices: Sequence[int] = DEVICES,
    *,
    seed: int = 0,
    options: Sequence[str] = (),
    timeout: timedelta = TIMEOUT,
    progress: Callable[[str], None] = lambda _: None,
) -> Findings:
    """Train undisturbed, then under `kills` signals, and compare.

    If a run finishes before all signals were sent, it is compared, and another begins in a new folder.

    Args:
        recipe: the recipe to train; in float64 if there are several numbers of devices and it is not exact.
        kills: number of signals to send.
        devices: numbers of ranks; the undisturbed run has the first, and each start one of them.
        seed: seed of the signals, their targets and times.
        options: options of `megdet train` for every start.
        timeout: how long a rank waits for another one.
        progress: called with a line after the undisturbed run, every signal and every run.

    Raises:
        InputError: the recipe or a layout is impossible, the undisturbed run fails, or this system is not Linux.
    """
    if "WORLD_SIZE" in os.environ:
        raise InputError("chaos starts its processes itself: run it without torchrun")
    if not Path("/proc/self/environ").exists():
        raise InputError("chaos finds the processes of a run in /proc, which this system does not have: use Linux")
    is_bitwise = recipe.exact or len(set(devices)) == 1
    if not is_bitwise:
        recipe = replace(recipe, precision="float64")
    for number in devices:
        recipe_layout(recipe, number)
    findings = Findings(is_bitwise=is_bitwise, seed=seed)
    findings.folder = Path(tempfile.mkdtemp(prefix="megdet_chaos_"))
    own = _Chaos(recipe, tuple(devices), [*options, "--timeout", str(timeout.total_seconds() / 60)], timeout, findings)
    own.progress = progress
    is_kept = False
    try:
        times = own.train_undisturbed()
        own.train_disturbed(disturbances(seed, tuple(devices)), kills, times)
        is_kept = not findings.passes
    finally:
        if not is_kept:
            shutil.rmtree(findings.folder)
    return findings


class _Chaos:
    """The runs of one `chaos`, in the folder of its findings."""

    progress: Callable[[str], None]

    def __init__(
        self, recipe: Recipe, devices: tuple[int, ...], options: Sequence[str], timeout: timedelta, findings: Findings
    ) -> None:
        assert findings.folder is not None
        self.recipe, self.devices, self.options, self.findings = recipe, devices, options, findings
        self.timeout, self.folder = timeout.total_seconds(), findings.folder
        self._recipe_file = self.folder / "recipe.yaml"
        self._epochs = math.ceil(decay_of(recipe.schedule).epochs)
        self._num_starts = 0
        write_text_atomically(self._recipe_file, dump_recipe(recipe))

    def run_folder(self, run: int) -> RunFolder:
        """The folder of a run; number 0 is the undisturbed run."""
        return RunFolder(self.folder / (f"run_{run}" if run else "undisturbed"))

    def start(self, run: int, devices: int) -> tuple[Command, Watched]:
        """Start a run, or start it again."""
        self._num_starts += 1
        folder = self.run_folder(run)
        watched = Watched(folder, self.recipe, self._epochs)
        words = ["train", str(self._recipe_file), "--run", str(folder.path), *self.options]
        log = self.folder / f"start_{self._num_starts:04d}.log"
        return Command(words, devices, uuid.uuid4().hex, log), watched

    def train_undisturbed(self) -> Times:
        """Train the run that the others are compared with. Raises InputError if it fails."""
        command, watched = self.start(0, self.devices[0])
        loading = 0.0
        try:
            while command.code is None:
                time.sleep(LOOK_SECONDS)
                if not loading and watched.now().activity != "loading":
                    loading = time.monotonic() - command.started
            whole = time.monotonic() - command.started
            if command.code:
                raise InputError(f"the undisturbed run failed: {command.last_line()}")
        finally:
            command.close()
        self.findings.undisturbed_seconds = whole
        self.progress(f"undisturbed on {self.devices[0]} device(s): {whole:.1f} s")
        lines = watched.lines()
        evaluations = [line["seconds"] for line in lines if "evaluation" in line]
        stepping = sum(line["seconds"] for line in lines if "loss" in line)
        return Times(loading, stepping, max(evaluations, default=0.0), whole)

    def train_disturbed(self, draws: Iterator[Disturbance], kills: int, times: Times) -> None:
        """Train until so many signals were sent and the last run is done; stop at the first fault."""
        run, starts, devices = 1, 0, self.devices[0]
        planned = [next(draws) for _ in range(kills)]
        while True:
            command, watched = self.start(run, devices)
            starts += 1
            start = Start(command, watched, times, self.timeout)
            try:
                is_disturbed = self._disturb(start, planned, run)
                code = start.wait_end()
                self._look_at_end(start, code, is_disturbed=is_disturbed)
            except HangError as hang:
                self.findings.faults.append(f"{hang}: {command.log}")
            finally:
                command.close()
            if self.findings.faults:
                return
            devices = self.devices[self._num_starts % len(self.devices)] if not planned else planned[0].devices
            if code == 0:
                self._compare(run, starts)
                if not planned:
                    return
                run, starts = run + 1, 0
                planned[0] = replace(planned[0], delay=planned[0].delay / 2)  # it was too late for this run

    def _disturb(self, start: Start, planned: list[Disturbance], run: int) -> bool:
        """Send the planned signals while the command runs; returns whether it may fail because of them."""
        is_disturbed = False
        while planned and start.wait_for(planned[0]):
            done = start.disturb(planned[0], len(self.findings.disturbed) + 1, run)
            if done is None:
                continue  # all processes had ended; the signal waits for the next start
            planned.pop(0)
            self.findings.disturbed.append(done)
            is_disturbed |= done.may_end
            if start.command.code is not None:
                done.steps_again = start.steps_again()
            self.progress(f"{done.number}: {done.sentence()}")
        return is_disturbed

    def _look_at_end(self, start: Start, code: int, *, is_disturbed: bool) -> None:
        """Note faults after a command has ended: a wrong exit code, processes left, a traceback."""
        command, faults = start.command, self.findings.faults
        if code and not is_disturbed:
            faults.append(
                f"a start ended with {code} though nothing had ended it: {command.last_line()}: {command.log}"
            )
        if orphans := command.orphans():
            faults.append(f"a start left {len(orphans)} processes, the first is {orphans[0]}: {command.log}")
        if traceback := command.traceback():
            faults.append(f"a traceback: {traceback}: {command.log}")

    def _compare(self, run: int, starts: int) -> None:
        folder = self.run_folder(run)
        try:
            difference, faults = compare(self.run_folder(0), folder, is_bitwise=self.findings.is_bitwise)
        except InputError as error:
            difference, faults = math.inf, [str(error)]
        self.findings.finished.append(Finished(run, starts, difference, tuple(faults)))
        self.progress(f"run {run} is done after {starts} starts: {faults[0] if faults else 'as the undisturbed one'}")
        if not faults:
            shutil.rmtree(folder.path)
