"""Images of the training set as an exported graph takes them: on them it is seen how large its numbers become."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megdet.data.coco import training_set
from megdet.data.image import read_image
from megdet.data.plan import evaluation_plan
from megdet.errors import InputError
from megdet.export.proof import some_of
from megdet.exported.detector import on_canvas
from megdet.recipe import Recipe

Inputs = tuple[NDArray[Any], NDArray[np.int64]]
"""Pixels of a canvas (1, 3, height, width) and the size of the image on it (1, 2)."""
Method = Literal["minmax", "percentile", "entropy"]


@dataclass(frozen=True)
class Calibration:
    """From what the ranges of 8-bit numbers are taken."""

    method: Method = "minmax"
    """minmax: all that was seen; percentile: all but the outermost 0.001 %; entropy: what loses least information"""
    images: int = 64
    """of the training set, evenly spread over it"""


def training_inputs(recipe: Recipe, images: int) -> list[Inputs]:
    """Some training images, each resized as for evaluation and alone on its canvas.

    Raises InputError where the training data cannot be read.
    """
    dataset = training_set(recipe.data, masks="none")
    chosen = some_of(len(dataset), images)
    if len(chosen) == 0:
        raise InputError(f"{dataset.annotations_file}: no image to calibrate on")
    inputs = []
    for index in chosen.tolist():
        pixels = read_image(dataset.image_path(index), size=tuple(dataset.sizes[index].tolist()))
        (group,) = evaluation_plan(np.array([pixels.shape[:2]], dtype=np.int64), recipe)
        inputs.append(on_canvas(group, [pixels]))
    return inputs
