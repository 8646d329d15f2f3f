"""Plans of a few images, and numbers of a plan for hypothesis."""

import numpy as np
from hypothesis import strategies as st

from megdet.data.plan import TrainingPlan
from megdet.data.planned import PlannedGroup
from megdet.recipe import Recipe


def some_sizes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 200, (count, 2))


def make_plan(count: int = 23, **recipe) -> TrainingPlan:
    return TrainingPlan(some_sizes(count), Recipe(**({"batch_size": 8, "bn_size": 4, "plan_window": 3} | recipe)))


def steps_of(plan: TrainingPlan, first: int, last: int) -> list[PlannedGroup]:
    return [group for step in range(first, last) for group in plan.groups(step)]


@st.composite
def some_plans(draw) -> dict[str, int]:
    """Numbers of a plan; it is made in the test, since the type checker draws random numbers of its own."""
    bn_size, group_size = draw(st.integers(0, 5)), draw(st.integers(1, 5))
    batch_size = draw(st.integers(1, 4)) * (bn_size or group_size)
    return {
        "count": batch_size + draw(st.integers(0, 20)),
        "batch_size": batch_size,
        "bn_size": bn_size,
        "group_size": group_size,
        "plan_window": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 3)),
    }
