"""The output of a run: a screen in a terminal, lines elsewhere."""

import time
from types import TracebackType
from typing import Any

from megdet.evaluation.coco_numbers import Evaluation
from megdet.model.choice import detector_class
from megdet.run_folder.folder import RunFolder
from megdet.screen.drawing import percent
from megdet.screen.live import LiveScreen, takes_screen
from megdet.screen.standing import Standing, line_of
from megdet.terminal import Terminal
from megdet.training.run import Run
from megdet.training.schedule import why_no_warmup
from megdet.training.trackers.trackers import Trackers

SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Shows on rank 0 how the run goes; a context manager, so that it leaves the terminal as it was.

    If standard error is a terminal, a screen at its bottom shows the newest numbers, with messages above it; elsewhere,
    or with `RunOptions.plain`, there is a line every ten seconds. It causes no extra reads from the device.
    """

    def __init__(self, run: Run, folder: RunFolder) -> None:
        self.run, self.folder, self.is_first = run, folder, run.world.is_first
        terminal = Terminal(stderr=True, wraps=True)
        has_screen = self.is_first and takes_screen(terminal) and not run.options.plain
        self.console = terminal if has_screen else Terminal(stderr=True)
        self.standing = standing_of(run, folder)
        self._screen = LiveScreen(terminal, self.standing) if has_screen else None
        self._trackers: Trackers | None = None
        self._told: list[dict[str, Any]] = []
        self._printed = time.monotonic()

    def __enter__(self) -> "Reporter":
        run, layout = self.run, self.run.layout
        last = run.last_step
        start = f"resuming at step {run.first_step} of {last}" if run.first_step else f"starting, {last} steps"
        self.say(
            f"{self.folder.path}: {start}; {run.plan.num_images} images, "
            f"{run.recipe.batch_size} a step in {_counted(layout.num_groups, 'group')} of {layout.group_size}, on "
            f"{self.standing.place}, in {_counted(layout.num_lanes, 'lane')} of {layout.lane_width}"
        )
        if left_out := run.datasets.train.num_weightless:
            self.say(f"{left_out} images are left out: weight 0 in {run.recipe.data.image_weights}")
        if no_warmup := why_no_warmup(run.recipe):
            self.say(no_warmup)
        if self.is_first and run.recipe.trackers:
            self._trackers = Trackers(run.recipe, self.folder, run.first_step, self.say)
        if self._screen is not None:
            self._screen.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._trackers is not None:
            self._trackers.__exit__(kind, error, traceback)
        if self._screen is not None:
            self._screen.__exit__(kind, error, traceback)

    def say(self, message: str) -> None:
        """Print a sentence."""
        if self.is_first:
            self.console.print(message)

    def remember(self, records: list[dict[str, Any]]) -> None:
        """Take the metrics of earlier starts of the run."""
        for record in records:
            self.standing.add(record)
        if self._screen is not None:
            self._screen.update(now=True)

    def steps(self, lines: list[dict[str, Any]]) -> None:
        """Take the metrics of some steps; print a line if it is time."""
        if not self.is_first or not lines:
            return
        if self._trackers is not None:
            self._trackers.steps(lines)
        for line in lines:
            self.standing.add(line)
        if self._screen is not None:
            self._screen.note = ""
            self._screen.update(now=lines[-1]["step"] == self.run.last_step)
            return
        self._told += lines
        if time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES or lines[-1]["step"] == self.run.last_step:
            self._print_line()

    def epoch_ended(self, means: dict[str, Any]) -> None:
        """Print how many of an epoch's samples were positive (Table 1)."""
        model = self.run.recipe.model
        ratios: dict[str, list[str]] = {}
        for counted in detector_class(model).counts:
            ratios.setdefault(counted.sample, []).append(f"{counted.ratio(means[counted.name], model):.1%}")
        shares = [
            f"{', '.join(own)} of the sampled {sample}s{' (stage by stage)' * (len(own) > 1)}"
            for sample, own in reversed(ratios.items())
        ]
        if shares:
            steps = _counted(means["steps"], "step")
            self.say(f"epoch {means['epoch']}: positive are {' and '.join(shares)} (mean of {steps})")

    def evaluating(self, step: int) -> None:
        """Show on the screen that the steps wait for an evaluation."""
        if self._screen is not None:
            self._screen.note = f"evaluating step {step}"
            self._screen.update(now=True)

    def evaluated(self, step: int, numbers: Evaluation, seconds: float) -> None:
        """Print the numbers of an evaluation."""
        if not self.is_first:
            return
        self.standing.add({"step": step, "evaluation": numbers.totals()})
        if self._trackers is not None:
            self._trackers.evaluated(step, numbers.totals())
        self._print_line()
        bbox, segm = numbers.bbox, numbers.segm
        of_masks = "" if segm is None else f"; masks: mmAP {percent(segm.AP)}, AP50 {percent(segm.AP50)}"
        self.console.print(
            f"epoch {self.run.plan.epochs_done(step):.2f}: mmAP {percent(bbox.AP)}, AP50 {percent(bbox.AP50)}, "
            f"mmAR {percent(bbox.AR100)}{of_masks} (evaluated in {seconds:.0f} s)"
        )
        self._printed = time.monotonic()
        if self._screen is not None:
            self._screen.note = ""
            self._screen.update(now=True)

    def _print_line(self) -> None:
        """The line of the steps since the last one, if there are any."""
        told, self._told = self._told, []
        if told:
            self.console.print(line_of(told, self.run.recipe.batch_size, self.run.last_step))
            self._printed = time.monotonic()


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def standing_of(run: Run, folder: RunFolder) -> Standing:
    """The standing of an open run, before its records are added."""
    place = f"{run.world.size} x {run.world.device.type}, {run.recipe.precision}"
    counts = run.trainer.model.counts
    out_of = {count.name: count.out_of_samples(run.recipe.model) for count in counts}
    return Standing(str(folder.path), place, run.recipe.batch_size, run.plan.num_images, run.last_step, out_of)
