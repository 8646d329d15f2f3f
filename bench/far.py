"""Images a second from a local folder, a zip and a web server on this machine, with and without copies, in turn.

    python bench/far.py --rounds 7 --milliseconds 20

One process loads batches of 16 JPEG files of 640 x 480 pixels, resized to 800 x 1067. The server is a process of its
own, which waits the given milliseconds before each answer, as a server far away does. Copies are kept in a temporary
folder: `first` fetches and writes them, `kept` reads them. How long a first and a second start take to read the sizes
of the images is told apart. The wall clock counts, since waiting is what it is about: run it on a quiet machine.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from rounds import in_turn, summary

from megdet.data.coco import CocoDataset, write_coco
from megdet.data.coco import validation_set as read_set
from megdet.data.plan import PlannedImage
from megdet.data.transforms import load_batch
from megdet.recipe import Data

WIDTH, HEIGHT = 640, 480
SIZE = (800, 1067)
IMAGES, BATCH = 96, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help=f"rounds of {IMAGES} images of each side")
    parser.add_argument("--milliseconds", type=float, default=20.0, help="that the server waits before an answer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        draw(folder)
        with serving(folder / "images", options.milliseconds / 1000) as address:
            report(options, *measure(folder, address, options.rounds))


def measure(folder: Path, address: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of all images, side and round; seconds of reading all sizes at a first and a second start."""
    places = {"local folder": str(folder / "images"), "zip": f"zip://::{folder / 'images.zip'}", "web server": address}
    starts, sets = dict[str, float](), dict[str, CocoDataset]()
    for name, place in places.items():
        for start in ("first", "second"):
            began = time.perf_counter()
            sets[name] = dataset_at(folder, place, 0.0)
            starts[f"{name}, {start} start"] = time.perf_counter() - began
    copied = dataset_at(folder, address, 10.0)

    def without_copies_first() -> None:
        shutil.rmtree(folder / "copies", ignore_errors=True)
        load_all(copied)

    sides = {
        "local folder": partial(load_all, sets["local folder"]),
        "zip": partial(load_all, sets["zip"]),
        "web server, no copies": partial(load_all, sets["web server"]),
        "web server, first": without_copies_first,
        "web server, kept": partial(load_all, copied),
    }
    return in_turn(sides, rounds), starts


def dataset_at(folder: Path, place: str, gib: float) -> CocoDataset:
    data = Data(
        val_annotations=str(folder / "instances.json"),
        val_images=place,
        cache_folder=str(folder / "copies"),
        far_cache_gib=gib,
    )
    return read_set(data, with_masks=False)


def load_all(dataset: CocoDataset) -> None:
    for first in range(0, IMAGES, BATCH):
        load_batch(dataset, [PlannedImage(index, 0, index, SIZE) for index in range(first, first + BATCH)], (800, 1088))


def draw(folder: Path) -> None:
    """Pictures with as much detail as photographs, as files and in a zip, and their annotations."""
    noise, names = np.random.default_rng(0), [f"{number:04}.jpg" for number in range(IMAGES)]
    (folder / "images").mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name in names:
            small = Image.fromarray(noise.integers(0, 256, (60, 80, 3), np.uint8))
            small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / "images" / name, quality=90)
            archive.write(folder / "images" / name, name)
    rows = [{"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT} for number, name in enumerate(names)]
    boxes = [{"id": row["id"], "image_id": row["id"], "category_id": 1, "bbox": [9, 9, 99, 99]} for row in rows]
    write_coco(folder / "instances.json", images=rows, annotations=boxes, categories=[{"id": 1, "name": "thing"}])


@contextmanager
def serving(folder: Path, seconds: float) -> Iterator[str]:
    """The address of a server of a folder, in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(folder, seconds, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def serve(folder: Path, seconds: float, told: Connection) -> None:
    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open
        wbufsize = -1  # head and body in one packet

        def send_head(self) -> Any:
            time.sleep(seconds)
            return super().send_head()

        def log_message(self, *words: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        told.send(server.server_address[1])
        server.serve_forever()


def report(options: argparse.Namespace, times: dict[str, list[float]], starts: dict[str, float]) -> None:
    found = summary(times, "local folder")
    if options.json:
        print(json.dumps({**found, "starts": starts, "images": IMAGES, "milliseconds": options.milliseconds}))
        return
    table = Table("side", "images a second", "of the local folder")
    for name, seconds in found["seconds"].items():
        low, high = found["ratio_spread"][name]
        table.add_row(name, f"{IMAGES / seconds:.0f}", f"{found['ratios'][name]:.2f} ({low:.2f} to {high:.2f})")
    console = Console()
    console.print(table)
    for name, seconds in starts.items():
        console.print(f"{name}: {seconds:.2f} s for the sizes of {IMAGES} images")
    console.print(f"{options.milliseconds:g} ms before an answer; {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
