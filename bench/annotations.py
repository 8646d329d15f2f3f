"""Starts on a data set of the size of COCO: seconds and peak memory of reading its annotations and headers.

    python bench/annotations.py --rounds 3

Draws 118,000 images and 860,000 objects with polygons, as long as COCO's (an annotation file of about 450 MB), into a
temporary folder. The image files are JPEG headers with sizes like COCO's and no pixels. Every start is a new process
with its own imports, which are not counted: the first start finds no cache, the second finds that of the first; in a
third a second rank of the host waits for the first one and maps what it has read; all three again with masks, the
first of them after a start without; and a first start meets EXIF notes that turn every photo by a quarter. Memory is
the peak of the process over what it had after its imports, pages of mapped files among it.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from megdet.data.coco import load_coco
from megdet.data.shared import once_a_host
from megdet.distributed.world import World
from megdet.training.datasets import fingerprint

IMAGES, OBJECTS, CLASSES = 118_000, 860_000, 80
SIZES = [(640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (375, 500), (640, 640), (612, 612), (640, 360)]
LINKS = 30_000
"""Most names of one file, fewer than any file system allows."""
STARTS = {
    "first": "plain",
    "second": "plain",
    "another rank of the host": "plain",
    "first with masks": "plain",
    "second with masks": "plain",
    "another rank with masks": "plain",
    "first, every photo turned": "turned",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="times that every start is made")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"images to draw, default {IMAGES}")
    parser.add_argument("--folder", type=Path, help="keep the drawn set here, and take it from here where it is")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--start", nargs=2, type=Path, metavar=("ANNOTATIONS", "IMAGES"), help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--masks", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        from megdet.distributed.local_ranks import run_in_ranks

        print(json.dumps(run_in_ranks(start, options.ranks, *options.start, options.masks)[-1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        if not (folder / "instances.json").exists():
            draw(folder, options.images)
        report(options, measure(folder, Path(name) / "cache", options.rounds), folder / "instances.json")


def draw(folder: Path, images: int) -> None:
    """The annotation file, and a folder of upright and one of turned photos."""
    source, rows = random.Random(0), []
    headers = [
        (width, height, photo_header(width, height, 1), photo_header(height, width, 6)) for width, height in SIZES
    ]
    for kind in ("plain", "turned"):
        (folder / kind).mkdir(parents=True)
    for number in range(images):
        width, height, plain, turned = headers[source.randrange(len(headers))]
        name = f"{number + 1:012}.jpg"
        rows.append({"id": number + 1, "file_name": name, "width": width, "height": height, "license": 1})
        for kind, content in (("plain", plain), ("turned", turned)):
            model = folder / f"{kind}-{width}-{height}-{number // LINKS}"
            if not model.exists():
                model.write_bytes(content)
            os.link(model, folder / kind / name)
    with (folder / "instances.json").open("w") as file:
        file.write('{"info":{},"licenses":[],"images":' + json.dumps(rows) + ',"annotations":[')
        for number in range(OBJECTS * images // IMAGES):
            row = rows[source.randrange(images)]
            w, h = (source.uniform(0.02, 0.6) * row[key] for key in ("width", "height"))
            x, y = source.uniform(0, row["width"] - w), source.uniform(0, row["height"] - h)
            points = max(8, int(source.lognormvariate(2.95, 0.7)) * 2)
            polygon = [
                round(v, 2) for _ in range(points // 2) for v in (x + w * source.random(), y + h * source.random())
            ]
            entry = {
                "segmentation": [polygon],
                "area": round(w * h * 0.7, 4),
                "iscrowd": 0,
                "image_id": row["id"],
                "bbox": [round(v, 2) for v in (x, y, w, h)],
                "category_id": source.randrange(CLASSES) + 1,
                "id": 1000 + number,
            }
            file.write(("," if number else "") + json.dumps(entry))
        categories = [{"id": number + 1, "name": f"class {number}", "supercategory": ""} for number in range(CLASSES)]
        file.write('],"categories":' + json.dumps(categories) + "}")


def photo_header(width: int, height: int, orientation: int) -> bytes:
    """A JPEG that says to be of this size, with the pixels of a much smaller one."""
    buffer, exif = BytesIO(), Image.Exif()
    exif[0x112] = orientation
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=exif)
    content = bytearray(buffer.getvalue())
    place = content.index(b"\xff\xc0") + 5  # behind the marker, its length and the bits of a value
    content[place : place + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(content)


def start(world: World, annotations: Path, images: Path, with_masks: bool) -> dict[str, float]:
    """What a run reads of its data before the first step: seconds of the clock and the processor, and bytes."""
    before, started, processor = peak(), time.perf_counter(), time.process_time()
    dataset = once_a_host(world, lambda: load_coco(annotations, images, keep_empty=False, with_masks=with_masks))
    loaded, processed = time.perf_counter(), time.process_time()
    fingerprint(dataset)
    seconds = {
        "load": loaded - started,
        "processor": processed - processor,
        "fingerprint": time.perf_counter() - loaded,
    }
    return {**seconds, "bytes": peak() - before, "images": len(dataset)}


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(folder: Path, cache: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """What every start of every round printed."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STARTS}
    for _ in range(rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for name, kind in STARTS.items():
            if kind == "turned":
                shutil.rmtree(cache)
            command = [sys.executable, __file__, "--start", str(folder / "instances.json"), str(folder / kind)]
            command += ["--ranks", "2"] if "rank" in name else []
            command += ["--masks"] if "masks" in name else []
            environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            found[name].append(json.loads(done.stdout))
    return found


def report(options: argparse.Namespace, found: dict[str, list[dict[str, float]]], file: Path) -> None:
    keys = ("load", "processor", "fingerprint", "bytes")
    medians = {name: {key: statistics.median(one[key] for one in runs) for key in keys} for name, runs in found.items()}
    spread = {name: [f([one["load"] for one in runs]) for f in (min, max)] for name, runs in found.items()}
    if options.json:
        result = {"rounds": options.rounds, "images": options.images, "file_bytes": file.stat().st_size}
        print(json.dumps({**result, "starts": medians, "load_spread": spread}))
        return
    table = Table("start", "seconds to load", "smallest to largest", "of the processor", "fingerprint", "peak memory")
    for name, one in medians.items():
        low, high = spread[name]
        seconds = [f"{one[key]:.2f}" for key in ("load", "processor", "fingerprint")]
        seconds.insert(1, f"{low:.2f} to {high:.2f}")
        table.add_row(name, *seconds, f"{one['bytes'] / 1e6:.0f} MB")
    Console().print(table)
    print(f"{options.images} images, an annotation file of {file.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
