"""A trained detector as a function of images."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

from megdet.api.images import Image, Pixels, each_image, is_one_image, pixels_of_any
from megdet.api.torchvision_loop import TorchvisionLoop
from megdet.detections import Detections
from megdet.errors import InputError
from megdet.exported.programs import is_exported
from megdet.inference.fold import fold_batch_norms
from megdet.inference.predict import detect_images
from megdet.inference.trained import TrainedDetector, load_detector, precision_here
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import checkpoint_step
from megdet.run_folder.folder import RunFolder
from megdet.runtime import device_of_rank, prepare_process

_HUB = "hf://"
_TOGETHER = 16
"""Images that are read before they are looked at; those of one canvas share a batch."""


class LoadedDetector:
    """Finds objects in images: `detector("street.jpg")`, `detector([image, image])`. `load` makes one.

    Args:
        trained: the detector and what its labels mean.
    """

    def __init__(self, trained: TrainedDetector) -> None:
        self.trained = trained

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
        """The network for a training loop of your own: images and targets as torchvision's detectors take them."""
        return TorchvisionLoop(self.trained)

    @overload
    def __call__(self, images: Image, *, score: float = 0.0) -> Detections: ...  # type: ignore[overload-overlap]  # strings
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


def load(
    path: str | Path, *, device: str = "", overrides: Mapping[str, Any] | None = None, fold: bool = False
) -> LoadedDetector:
    """A trained detector, ready to be called with images.

    Args:
        path: a run folder (its newest checkpoint), one of its checkpoints (`runs/a/checkpoints/step_00000100`), a
            repository on the Hugging Face hub (`hf://owner/name`), or a file of `megdet export`, which takes no other
            argument.
        device: cpu or cuda; empty is a GPU where there is one. A detector in bfloat16 computes in float32 on a machine
            that is slow at bfloat16; the results differ a little.
        overrides: keys of its recipe to change, such as {"evaluation.flip": True}.
        fold: fold the batch norms into the convolutions before them: quicker, and the same to rounding.

    Raises:
        InputError: it is no run, has no checkpoint, or does not fit; the hub does not answer.
    """
    if is_exported(path):
        from megdet.api.exported_file import LoadedFile

        if device or overrides or fold:
            raise InputError(f"{path}: an exported file is as it is: leave out device, overrides and fold")
        return LoadedFile(Path(path))
    folder, step = _place(path)
    own_device = device_of_rank(device, 0)
    prepare_process(own_device)
    changed, _ = precision_here(folder, dict(overrides or {}), own_device)
    trained = load_detector(folder, own_device, changed, step=step)
    if fold:
        fold_batch_norms(trained.model)
    return LoadedDetector(trained)


def _place(name: str | Path) -> tuple[RunFolder, int | None]:
    """The run folder of a path or of a name on the hub, and the step if it is a checkpoint."""
    if str(name).startswith(_HUB):
        from megdet.export.hub import cached_run

        return cached_run(str(name).removeprefix(_HUB)), None
    path = Path(name)
    if (path / "state.json").is_file() and path.parent.name == "checkpoints":
        return RunFolder(path.parent.parent), checkpoint_step(path)
    if not path.exists():
        raise InputError(f"{path}: no such run folder")
    return RunFolder(path), None
