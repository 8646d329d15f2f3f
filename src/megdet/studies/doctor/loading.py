"""Measures how many images a second one process decodes and resizes."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megdet.data.coco import CocoDataset, load_coco
from megdet.data.far.folder import ImageFile, ImageFolder
from megdet.data.image import read_image
from megdet.data.transforms import resize
from megdet.recipe import Data
from megdet.studies.doctor.finding import Finding

_SECONDS = 1.0
_SLOW = 10.0
"""Images a second of one process below which loading may hold up steps; a GPU trains some tens a second."""
_DRAWN, _DRAWN_SIZE = 4, (640, 480)


def look_at_loading(annotations: Path | None = None, images: ImageFolder | None = None) -> Finding:
    """Time one process on the images of a COCO file, or on a few drawn ones of 640 x 480 pixels."""
    if annotations is not None and images is not None:
        dataset = load_coco(annotations, images, keep_empty=True)
        return _finding(_paths(dataset), f"of {annotations.name}")
    with tempfile.TemporaryDirectory() as folder:
        return _finding(_drawn(Path(folder)), f"of {_DRAWN_SIZE[0]} x {_DRAWN_SIZE[1]} pixels, drawn")


def _finding(files: Sequence[ImageFile], what: str) -> Finding:
    count, started = 0, time.perf_counter()
    edge = Data.short_edges[-1]
    while (passed := time.perf_counter() - started) < _SECONDS or count == 0:
        pixels = read_image(files[count % len(files)])
        height, width = pixels.shape[:2]
        scale = min(edge / min(height, width), Data.max_long_edge / max(height, width))
        resize(pixels, (round(height * scale), round(width * scale)))
        count += 1
    speed = count / passed
    text = f"{speed:.0f} images/s a process, {what}, resized to {edge} pixels"
    numbers = {"images_a_second": speed, "images": count}
    if speed < _SLOW:
        step = "more --workers, or data.cache decoded, if the training says that it waits for data"
        return Finding("loading", "look", text, step, numbers)
    return Finding("loading", "good", text, numbers=numbers)


def _paths(dataset: CocoDataset) -> list[ImageFile]:
    """Some images, spread over the whole data set."""
    places = np.linspace(0, len(dataset) - 1, min(200, len(dataset))).round().astype(int)
    return [dataset.image_path(place) for place in dict.fromkeys(places.tolist())]


def _drawn(folder: Path) -> list[Path]:
    """Drawn pictures with as much detail as photographs."""
    noise = np.random.default_rng(0)
    files = []
    for number in range(_DRAWN):
        small = noise.integers(0, 256, (60, 80, 3), np.uint8)
        file = folder / f"{number}.jpg"
        Image.fromarray(small).resize(_DRAWN_SIZE, Image.Resampling.BICUBIC).save(file, quality=90)
        files.append(file)
    return files
