"""The output of a run for people, and TensorBoard if the recipe asks for it."""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from megdet.data.plan import TrainingPlan
from megdet.distributed.layout import Layout
from megdet.distributed.world import World
from megdet.evaluation.coco_numbers import Evaluation
from megdet.model.choice import detector_class
from megdet.recipe import Recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_length import total_steps
from megdet.terminal import Terminal
from megdet.training.schedule import why_no_warmup

SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Prints a line every few seconds on rank 0: step, loss, rate, images a second, time left."""

    def __init__(
        self,
        recipe: Recipe,
        plan: TrainingPlan,
        layout: Layout,
        world: World,
        folder: RunFolder,
        *,
        first_step: int,
    ) -> None:
        self.recipe, self.plan, self.folder, self.is_first = recipe, plan, folder, world.is_first
        self.console = Terminal(stderr=True)
        self.last_step = total_steps(recipe, plan.num_images)
        self._recent: list[dict[str, Any]] = []
        self._printed = time.monotonic()
        self._board: Any = None
        if not self.is_first:
            return
        if recipe.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here, because it takes seconds to import

            self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_step)
        start = f"resuming at step {first_step}" if first_step else "starting"
        self.console.print(
            f"{folder.path}: {start} of {self.last_step}; {plan.num_images} images, {recipe.batch_size} a step in "
            f"{layout.num_groups} groups of {layout.group_size}, on {world.size} x {world.device.type} "
            f"in {layout.num_lanes} lanes of {layout.lane_width}, {recipe.precision}"
        )
        if no_warmup := why_no_warmup(recipe):
            self.console.print(no_warmup)

    def say(self, message: str) -> None:
        """Print a sentence."""
        if self.is_first:
            self.console.print(message)

    def steps(self, lines: list[dict[str, Any]]) -> None:
        """Take the metrics of some steps; print a line if it is time."""
        if not self.is_first or not lines:
            return
        self._recent += lines
        if self._board is not None:
            for line in lines:
                for name, value in _scalars(line, "train/"):
                    self._board.add_scalar(name, value, line["step"])
        if time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES or lines[-1]["step"] == self.last_step:
            self._print(lines[-1])

    def epoch_ended(self, means: dict[str, Any]) -> None:
        """Print how many of an epoch's samples were positive (Table 1)."""
        model = self.recipe.model
        shares = [
            f"{counted.ratio(means[counted.name], model):.1%} of the sampled {counted.sample}s"
            for counted in reversed(detector_class(model).counts)
        ]
        if shares:
            self.say(f"epoch {means['epoch']}: positive are {' and '.join(shares)} (mean of {means['steps']} steps)")

    def evaluated(self, step: int, numbers: Evaluation, seconds: float) -> None:
        """Print the numbers of an evaluation."""
        if not self.is_first:
            return
        if self._recent:
            self._print(self._recent[-1])
        if self._board is not None:
            for kind, of_kind in numbers.totals().items():
                for name in ("AP", "AP50", "AP75", "AR100"):
                    self._board.add_scalar(f"evaluation/{kind}/{name}", of_kind[name], step)
            self._board.flush()
        bbox, segm = numbers.bbox, numbers.segm
        of_masks = "" if segm is None else f"; masks: mmAP {_percent(segm.AP)}, AP50 {_percent(segm.AP50)}"
        self.console.print(
            f"epoch {self.plan.epochs_done(step):.2f}: mmAP {_percent(bbox.AP)}, AP50 {_percent(bbox.AP50)}, "
            f"mmAR {_percent(bbox.AR100)}{of_masks} (evaluated in {seconds:.0f} s)"
        )
        self._printed = time.monotonic()

    def _print(self, line: dict[str, Any]) -> None:
        recent, self._recent = self._recent, []
        seconds = sum(item["seconds"] for item in recent)
        pace = len(recent) * self.recipe.batch_size / max(seconds, 1e-9)
        left = (self.last_step - line["step"]) * seconds / len(recent)
        waiting = sum(item["data_seconds"] for item in recent) / max(seconds, 1e-9)
        losses = [item["loss"] for item in recent if "left_out" not in item]
        loss = sum(losses) / len(losses) if losses else math.nan
        self.console.print(
            f"epoch {line['epoch']:6.2f}  step {line['step']:6d}/{self.last_step}  loss {loss:.4f}  "
            f"lr {line['learning_rate']:.5f}  {pace:.1f} images/s  waiting for data {waiting:.0%}  "
            f"{left / 60:.1f} min left"
        )
        self._printed = time.monotonic()


def _scalars(line: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers of a line, those of nested mappings under their whole path."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif not isinstance(value, str):
            yield f"{prefix}{name}", value


def _percent(number: float) -> str:
    """A number of 0..1 in percent; -1 means that the ground truth has no such box."""
    return "-" if number < 0 else f"{100 * number:.1f}"
