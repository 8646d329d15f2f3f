"""The length of a run and the steps at which its learning rate falls (the policies of Sec. 4)."""

import math
from dataclasses import dataclass

from megdet.recipe import Recipe, Schedule

_POLICIES = {
    "normal": (11.0, (8.0, 10.0), (0.1, 0.1)),
    "long": (18.0, (11.0, 14.0, 17.0), (0.1, 0.1, 0.5)),
}


@dataclass(frozen=True)
class Decay:
    """Length of the run and its decays, in epochs."""

    epochs: float
    milestones: tuple[float, ...]
    factors: tuple[float, ...]


def decay_of(schedule: Schedule) -> Decay:
    """The length and the milestones of a policy; cosine has none."""
    if schedule.policy in _POLICIES:
        return Decay(*_POLICIES[schedule.policy])
    return Decay(schedule.epochs or 0.0, schedule.milestones, schedule.factors)


def total_steps(recipe: Recipe, num_images: int) -> int:
    """Steps of the whole run."""
    return math.ceil(decay_of(recipe.schedule).epochs * num_images / recipe.batch_size - 1e-9)
