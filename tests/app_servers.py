"""Servers for the tests of the web demo: an application in a thread, and the command as a process of its own."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from megdet.api.images import Pixels
from megdet.app.application import make_application
from megdet.app.batcher import Batcher
from megdet.app.requests import Limits
from megdet.app.runs import ServedRun
from megdet.app.server import PunctualProtocol, address_of, bound_socket, make_server
from megdet.data.rle import encode_mask
from megdet.detections import Detections
from small_runs import save_run, small_recipe, write_small_sets

CLASSES = ("<b>bolt</b>", "nut", "gear")
Detect = Callable[[Sequence[Pixels]], list[Detections]]


def png(height: int = 30, width: int = 40, value: int = 200) -> bytes:
    """A gray image file."""
    file = BytesIO()
    Image.new("RGB", (width, height), (value, value, value)).save(file, "png")
    return file.getvalue()


def three_objects(images: Sequence[Pixels], *, with_masks: bool = False) -> list[Detections]:
    """In every image an object of each class; its scores follow from how bright the image is."""
    found = []
    for image in images:
        height, width = image.values.shape[:2]
        boxes = np.array([[1.0, 2, 11, 12], [5, 5, 25, 20], [0, 0, width, height]])
        scores = np.array([0.9, 0.6, 0.3]) * image.values.mean() / 200
        masks = [encode_mask(np.ones((4, 6), np.bool_), int(x), int(y), (height, width)) for x, y, _, _ in boxes]
        own = Detections(boxes, scores, np.arange(3), CLASSES, (10, 20, 30), (height, width))
        found.append(replace(own, masks=tuple(masks)) if with_masks else own)
    return found


def served(
    detect: Detect = three_objects, name: str = "first", together: int = 8, pixels: int = 1_000_000
) -> ServedRun:
    """A run whose detector is a function."""
    return ServedRun(name, detect, CLASSES, (10, 20, 30), False, together, pixels)


@contextmanager
def serving(
    *runs: ServedRun, limits: Limits | None = None, waiting: int = 64, head_seconds: float = 10.0
) -> Iterator[tuple[str, Batcher]]:
    """A real server on a free port of this machine, in a thread; its address, and what it works with."""

    class Protocol(PunctualProtocol):
        pass

    Protocol.head_seconds = head_seconds
    with bound_socket("127.0.0.1", 0) as own, Batcher(runs, waiting) as batcher:
        listens = threading.Event()
        server = make_server(make_application(batcher, limits or Limits()), listens.set, Protocol)
        thread = threading.Thread(target=server.run, args=([own],))
        address = address_of(own)
        thread.start()
        assert listens.wait(60)
        try:
            yield address, batcher
        finally:
            server.should_exit = True
            thread.join()


@dataclass(frozen=True)
class Command:
    """`megdet serve` with two runs."""

    process: "subprocess.Popen[str]"
    address: str
    runs: tuple[Path, Path]
    image: Path


@contextmanager
def command(folder: Path, *words: str) -> Iterator[Command]:
    """The command as a process of its own, when it listens; killed at the end if it still runs."""
    recipe = small_recipe(write_small_sets(folder))
    runs = [save_run(folder / name, recipe, seed=seed)[0].path for seed, name in enumerate(("a", "b"))]
    call = [sys.executable, "-m", "megdet", "serve", *map(str, runs), "--port", "0", "--device", "cpu", *words]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("a and b at http://127.0.0.1:"), line
            image = sorted(Path(recipe.data.val_images).iterdir())[0]
            yield Command(process, line.split()[4], (runs[0], runs[1]), image)
        finally:
            process.kill()
