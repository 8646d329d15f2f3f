"""A trained detector as a function of images."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import overload

from megdet.api.images import Image, Pixels, each_image, is_one_image, pixels_of_any
from megdet.api.torchvision_loop import TorchvisionLoop
from megdet.detections import Detections
from megdet.errors import InputError
from megdet.inference.predict import detect_images
from megdet.inference.trained import TrainedDetector
from megdet.recipe import Recipe

_TOGETHER = 16
"""Images that are read before they are looked at; those of one canvas share a batch."""


class LoadedDetector:
    """Finds objects in images: `detector("street.jpg")`, `detector([image, image])`. `load` makes one.

    Args:
        trained: the detector and what its labels mean.
        is_folded: its batch norms are folded into the convolutions before them.
    """

    def __init__(self, trained: TrainedDetector, *, is_folded: bool = False) -> None:
        self.trained, self.is_folded = trained, is_folded

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that it knows, in the order of their labels."""
        return self.trained.class_names

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The number of each class in the COCO file that it was trained on."""
        return self.trained.category_ids

    @property
    def has_masks(self) -> bool:
        """Whether it finds the pixels of an object, not its box alone."""
        return self.trained.model.has_masks

    @property
    def recipe(self) -> Recipe:
        """That of its run, with what was changed when it was loaded."""
        return self.trained.recipe

    @cached_property
    def model(self) -> TorchvisionLoop:
        """The network for a training loop of your own: images and targets as torchvision's detectors take them.

        The detector itself detects as in evaluation, whatever mode this is in. Raises InputError for a folded one.
        """
        if self.is_folded:
            raise InputError("a detector with folded batch norms cannot be trained: load it without fold")
        return TorchvisionLoop(self.trained)

    @overload
    def __call__(self, images: Image, *, score: float = 0.0) -> Detections: ...  # type: ignore[overload-overlap]  # str is one too
    @overload
    def __call__(self, images: Iterable[Image], *, score: float = 0.0) -> list[Detections]: ...
    def __call__(self, images: Image | Iterable[Image], *, score: float = 0.0) -> Detections | list[Detections]:
        """What is found in one image, or in each of several.

        Args:
            images: one or many: paths, addresses, Pillow images, arrays (height, width, 3) of 8 bits in the order RGB,
                tensors (3, height, width) of 8 bits or of floats from 0 to 1; or a folder.
            score: leave out what has a lower one.

        Raises:
            InputError: an image cannot be read, or is none.
        """
        found = list(self.each(images, score=score))
        return found[0] if is_one_image(images) else found

    def each(self, images: Image | Iterable[Image], *, score: float = 0.0) -> Iterator[Detections]:
        """The same one by one, for more images than fit the memory. Those of files do not keep their pixels."""
        source = iter(each_image(images))
        while some := list(islice(source, _TOGETHER)):
            read = [pixels_of_any(image, self.recipe.data.max_pixels) for image in some]
            for own, found in zip(read, self.detect(read), strict=True):
                kept = None if own.is_file else own.values
                yield replace(found.above(score) if score else found, pixels=kept, source=own.source)

    def detect(self, images: Iterable[Pixels]) -> list[Detections]:
        """What is found in images that have been read."""
        return detect_images(self.trained, [image.values for image in images])

    def __repr__(self) -> str:
        kind, names = self.recipe.model.kind, ", ".join(self.class_names[:6])
        more = ", ..." if len(self.class_names) > 6 else ""
        return f"<{type(self).__name__} {kind} of {len(self.class_names)} classes: {names}{more}>"
