"""The steps after which a run pauses by its recipe: epochs that end, checkpoints and evaluations that are due."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megdet.data.plan import TrainingPlan
from megdet.recipe import Recipe


@dataclass(frozen=True)
class Stop:
    """What a run does after a step."""

    is_saved: bool = False
    is_evaluated: bool = False


@dataclass(frozen=True)
class Stops:
    """What a run does after which step; neither the clock nor a signal decides any of it."""

    ends: Mapping[int, Stop]
    """by the step with which an epoch or the run ends"""
    every: int
    """steps from one checkpoint to the next besides, 0 for none"""

    def __contains__(self, step: int) -> bool:
        return step in self.ends

    def after(self, step: int) -> Stop:
        """What the run does after so many steps."""
        end = self.ends.get(step, Stop())
        return Stop(end.is_saved or bool(self.every and step % self.every == 0), end.is_evaluated)

    def is_saved_after(self, step: int) -> bool:
        """Whether the recipe asks for a checkpoint after so many steps."""
        return self.after(step).is_saved

    def newest_saved(self, step: int) -> int:
        """The last step up to this one after which there is to be a checkpoint, 0 for none."""
        return next((own for own in range(step, 0, -1) if self.is_saved_after(own)), 0)


def stops_of(plan: TrainingPlan, recipe: Recipe, last: int) -> Stops:
    """The stops of a run whose last step is `last`."""
    every, ends = recipe.evaluation.every_epochs, dict[int, Stop]()
    for epoch in range(1, math.ceil(plan.epochs_done(last)) + 1):
        if plan.epoch_end(epoch) < last:
            is_evaluated = bool(every and epoch % every == 0)
            # saved before it is evaluated: an error or a stop in the evaluation must not lose the epoch
            keeps = recipe.keep_every_epochs
            is_kept = bool(keeps and epoch % keeps == 0)
            is_saved = epoch % recipe.checkpoint_epochs == 0 or is_evaluated or is_kept
            ends[plan.epoch_end(epoch)] = Stop(is_saved, is_evaluated)
    return Stops(ends | {last: Stop(is_saved=True, is_evaluated=True)}, recipe.checkpoint_steps)
