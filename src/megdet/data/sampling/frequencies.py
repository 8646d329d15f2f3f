"""How often each image comes in an epoch: its weight times its repeat factor.

They are multiplied because they are independent reasons: the weight says how much an image counts, the factor how
seldom its classes are. So a table of equal weights changes nothing, whatever its scale, which the larger of the two
would not give.
"""

import numpy as np
from numpy.typing import NDArray

from megdet.data.coco import CocoDataset
from megdet.data.plan import TrainingPlan
from megdet.data.sampling.repeats import repeat_factors
from megdet.recipe import Data, Recipe


def training_plan(dataset: CocoDataset, recipe: Recipe) -> TrainingPlan:
    """The plan of a data set. Raises InputError if it is smaller than one mini-batch."""
    return TrainingPlan(dataset.sizes, recipe, frequencies(dataset, recipe.data))


def frequencies(dataset: CocoDataset, data: Data) -> NDArray[np.float64] | None:
    """(images,): how often each image comes, compared with the others; None if all come once an epoch."""
    factors = repeat_factors(dataset, data.repeat_threshold) if data.repeat_threshold else None
    if dataset.weights is None:
        return factors
    return dataset.weights if factors is None else dataset.weights * factors
