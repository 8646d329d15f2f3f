"""Numbers of each image: objects found, wrong detections and F1, at IoU 0.5 and a score threshold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from megdet.evaluation.matches import ClassMatches


@dataclass(frozen=True)
class ImageCounts:
    """The number of objects of every image, of objects found, and of wrong detections."""

    objects: Int64[np.ndarray, " images"]
    right: Int64[np.ndarray, " images"]
    wrong: Int64[np.ndarray, " images"]

    @property
    def f1(self) -> Float[np.ndarray, " images"]:
        """2 x right / (shown + objects); 1 if there is no object and nothing is shown."""
        total = self.right + self.wrong + self.objects
        return np.where(total > 0, 2 * self.right / np.maximum(total, 1), 1.0)

    def worst(self, most: int) -> list[int]:
        """The images of the lowest F1, among equals those with most mistakes; only images with a mistake."""
        mistakes = self.objects - self.right + self.wrong
        order = np.lexsort((np.arange(len(mistakes)), -mistakes, self.f1))
        return [int(image) for image in order if mistakes[image]][:most]

    def best(self, most: int) -> list[int]:
        """The images of the highest F1 with an object found, among equals those with most objects."""
        order = np.lexsort((np.arange(len(self.objects)), -self.objects, -self.f1))
        return [int(image) for image in order if self.right[image]][:most]


def image_counts(classes: Sequence[ClassMatches], threshold: float) -> ImageCounts:
    """The counts of every image for the detections of at least this score."""
    num_images = len(classes[0].objects)
    right, wrong = np.zeros((2, num_images), np.int64)
    for own in classes:
        is_shown = (own.scores >= threshold) & own.is_counted[:, 0]
        right += np.bincount(own.images[is_shown & own.is_right[:, 0]], minlength=num_images)
        wrong += np.bincount(own.images[is_shown & ~own.is_right[:, 0]], minlength=num_images)
    return ImageCounts(np.sum([own.objects for own in classes], axis=0), right, wrong)
