"""The fraction of positive samples in an epoch, for the epoch's line in metrics.jsonl (Table 1)."""

from typing import Any

from megdet.data.plan import TrainingPlan
from megdet.model.choice import detector_class


class EpochMeans:
    """Means over the steps of each epoch, from the lines of the steps."""

    def __init__(self, plan: TrainingPlan, done: list[dict[str, Any]]) -> None:
        """`done` are the lines of the steps before this start of the run; the last may be of an unfinished epoch."""
        self.plan = plan
        self.counts = detector_class(plan.recipe.model).counts
        self._own: list[dict[str, Any]] = []
        self._epoch = 1
        for line in done:
            self.add(line)

    def add(self, line: dict[str, Any]) -> dict[str, Any] | None:
        """Take a step's line; returns the line of the epoch if one ends with this step.

        `steps` in it counts the lines found: metrics.jsonl may have lost some earlier lines, and steps whose update was
        left out do not count.
        """
        while line["step"] > self.plan.epoch_end(self._epoch):
            self._own, self._epoch = [], self._epoch + 1
        if "left_out" not in line:
            self._own.append(line)
        if line["step"] < self.plan.epoch_end(self._epoch) or not self._own:
            return None
        own, count = self._own, len(self._own)
        names = ("loss", *(counted.name for counted in self.counts))
        means = {name: sum(step[name] for step in own) / count for name in names}
        ratios = {
            f"{counted.name}_ratio": counted.ratio(means[counted.name], self.plan.recipe.model)
            for counted in self.counts
            if counted.out_of
        }
        return {"step": line["step"], "epoch_means": {"epoch": self._epoch, "steps": count, **means, **ratios}}
