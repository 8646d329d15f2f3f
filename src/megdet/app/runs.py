"""The detectors that are served."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megdet.api.detector import LoadedDetector
from megdet.api.images import Pixels
from megdet.api.loading import load
from megdet.detections import Detections
from megdet.errors import printable


@dataclass(frozen=True)
class ServedRun:
    """A detector, and what clients learn of it."""

    name: str
    """that of its folder, without the path"""
    detect: Callable[[Sequence[Pixels]], list[Detections]]
    """what is found in images, in their order; called by one thread alone"""
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    has_masks: bool
    most_together: int
    """images of one call: the recipe's `evaluation.batch_size`"""
    max_pixels: int
    """of the largest image that is decoded: the recipe's `data.max_pixels`"""


def load_runs(paths: Sequence[str], device: str, overrides: Mapping[str, Any], *, fold: bool) -> list[ServedRun]:
    """The detectors of some paths, each as `megdet.load` reads it. Raises InputError."""
    names = distinct_names(paths)
    return [
        served_run(name, load(path, device=device, overrides=overrides, fold=fold))
        for name, path in zip(names, paths, strict=True)
    ]


def served_run(name: str, detector: LoadedDetector) -> ServedRun:
    """A loaded detector under a name."""
    recipe = detector.recipe
    return ServedRun(
        name,
        detector.detect,
        tuple(map(printable, detector.class_names)),
        detector.category_ids,
        detector.has_masks,
        recipe.evaluation.batch_size,
        recipe.data.max_pixels,
    )


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, behind the run's for a checkpoint, and numbered where two are alike."""
    names: list[str] = []
    for path in map(Path, paths):
        place = path.resolve()
        is_checkpoint = place.parent.name == "checkpoints"
        name = printable(f"{place.parent.parent.name} {place.name}" if is_checkpoint else place.name) or "run"
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names
