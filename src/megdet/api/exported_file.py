"""An exported file as a function of images, as `load` returns it."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from megdet.api.detector import LoadedDetector
from megdet.api.images import Pixels
from megdet.api.torchvision_loop import TorchvisionLoop
from megdet.detections import Detections
from megdet.errors import InputError
from megdet.exported.detector import ExportedDetector
from megdet.recipe import Recipe


class LoadedFile(LoadedDetector):
    """A detector out of a file of `megdet export`: it finds objects, and cannot be trained.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.exported = ExportedDetector(path)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that it knows, in the order of their labels."""
        return self.exported.class_names

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The number of each class in the COCO file that it was trained on."""
        return self.exported.category_ids

    @property
    def has_masks(self) -> bool:
        """Whether it finds the pixels of an object, not its box alone."""
        return self.exported.has_masks

    @property
    def recipe(self) -> Recipe:
        """That of the run that it was exported from."""
        return self.exported.recipe

    @cached_property
    def model(self) -> TorchvisionLoop:
        """It has none. Raises InputError."""
        raise InputError(f"{self.exported.path}: an exported detector has no model to train: load the run it came from")

    def detect(self, images: Iterable[Pixels]) -> list[Detections]:
        """What is found in images that have been read."""
        return self.exported.detect([image.values for image in images])
