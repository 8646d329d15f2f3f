"""From JPEG files of 640 x 480 to tensors of 800 x 1067 on one core: ours beside PIL's pipeline, in turn.

    python bench/data.py --rounds 15

Every side ends with a uint8 tensor of three channels, resized bilinearly with antialias. PIL's ends channels first in
memory, as torchvision's `to_tensor` does; "PIL, channels last" leaves out that copy, as ours does. Prints the median
milliseconds an image and the ratio, PIL's time over each side's. The time is the processor's (files in memory, one
thread), so that a neighbour on the machine does not count. Compare ratios: its speed drifts all the same.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from PIL import Image
from rich.console import Console
from rich.table import Table
from rounds import summary
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from megdet.data.cache import ImageCache
from megdet.data.image import _to_rgb, read_image
from megdet.data.transforms import resize

WIDTH, HEIGHT = 640, 480
SIZE = (800, 1067)
IMAGES = 24
Side = Callable[[int, Path], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help=f"counted rounds of {IMAGES} images of each side")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report(options, *measure(Path(folder), options.rounds))


def measure(folder: Path, rounds: int) -> tuple[dict[str, list[float]], int, float]:
    """Processor seconds an image, side and round; the largest difference from PIL's pixels; bytes of a file."""
    files = draw(folder)
    decoded = ImageCache(folder / "decoded", IMAGES, is_resized=False)
    resized = ImageCache(folder / "resized", IMAGES, is_resized=True)
    sides: dict[str, Side] = {
        "PIL": lambda index, file: pil(index, file).contiguous(),
        "PIL, channels last": pil,
        "torchvision decode, v2 resize": with_torchvision,
        "Pillow decode, v2 resize": with_pillow,
        "megdet": lambda _, file: resize(read_image(file), SIZE),
        "megdet, decoded in the cache": lambda index, file: resize(
            decoded.pixels(index, file, "decoded", lambda: read_image(file)), SIZE
        ),
        "megdet, resized in the cache": lambda index, file: torch.from_numpy(
            resized.pixels(index, file, "resized", lambda: resize(read_image(file), SIZE).permute(1, 2, 0).numpy())
        ).permute(2, 0, 1),
    }
    difference = max(int((sides["megdet"](0, file).int() - pil(0, file).int()).abs().max()) for file in files)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = time.process_time()
            for index, file in enumerate(files):
                side(index, file)
            if number:  # the first round warms up and fills the caches
                times[name].append((time.process_time() - started) / len(files))
    return times, difference, statistics.mean(file.stat().st_size for file in files)


def draw(folder: Path) -> list[Path]:
    """Pictures with detail at every scale, as photos have."""
    random, files = np.random.default_rng(0), []
    for index in range(IMAGES):
        picture = np.zeros((HEIGHT, WIDTH, 3))
        for scale in (4, 8, 16, 32, 64, 128, 256):
            coarse = random.normal(128, 60, (HEIGHT // scale + 2, WIDTH // scale + 2, 3)).clip(0, 255).astype(np.uint8)
            picture += scale**0.7 * np.asarray(
                Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            )
        picture = 128 + 50 * (picture - picture.mean()) / picture.std() + random.normal(0, 4, picture.shape)
        files.append(folder / f"{index}.jpg")
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(files[-1], quality=92)
    return files


def pil(_: int, file: Path) -> Tensor:
    with Image.open(file) as image:
        picture = image.convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR)
    tensor: Tensor = V.pil_to_tensor(picture)
    return tensor


def with_pillow(_: int, file: Path) -> Tensor:
    with Image.open(file) as image:
        return resize(_to_rgb(image), SIZE)


def with_torchvision(_: int, file: Path) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        picture = decode_jpeg(read_file(str(file)), ImageReadMode.RGB)
    tensor: Tensor = V.resize(picture, list(SIZE), antialias=True)
    return tensor


def report(options: argparse.Namespace, times: dict[str, list[float]], difference: int, num_bytes: float) -> None:
    figures = summary(times, "PIL")
    medians = figures["seconds"]
    versions = {"Pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__, "torchvision": torchvision.__version__}
    if options.json:
        result = {
            "rounds": options.rounds,
            "ratio": figures["ratios"]["megdet"],
            "ratio_to_channels_last": medians["PIL, channels last"] / medians["megdet"],
            **figures,
            "images_per_second": {name: 1 / seconds for name, seconds in medians.items()},
            "largest_difference_from_pil": difference,
            "bytes_a_file": num_bytes,
            "processor": platform.processor() or platform.machine(),
            "versions": versions,
        }
        print(json.dumps(result))
        return
    table = Table("side", "ms an image", "images a second", "against PIL", "smallest to largest")
    for name, seconds in medians.items():
        spread = " to ".join(f"{ratio:.2f}" for ratio in figures["ratio_spread"][name])
        ratio = f"{figures['ratios'][name]:.2f}"
        table.add_row(name, f"{1000 * seconds:.2f}", f"{1 / seconds:.0f}", ratio, spread)
    console = Console()
    console.print(table)
    console.print(
        f"files of {num_bytes / 1000:.0f} kB, one thread, {', '.join(f'{k} {v}' for k, v in versions.items())}"
    )
    console.print(f"largest difference of megdet's pixels from PIL's: {difference} of 255")


if __name__ == "__main__":
    main()
