"""The demo data set: drawn shapes on textured backgrounds, the same pixels on every call.

Every picture is drawn by its own counter-based generator keyed by (seed, split, index), so that any number of
processes draws the same set. Colours say nothing about the class.
"""

import io
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from megdet.data.coco import write_coco
from megdet.data.shapes import OUTLINES, Shape, paint, place, visible_parts
from megdet.errors import InputError
from megdet.files import read_json, replace_file

CLASS_NAMES = tuple(OUTLINES)
"""the classes of the demo data, in the order of their category ids 1, 2, ..."""

_VERSION = 2
"""Version of the files; version 1 had polygons of whole shapes, hidden parts included."""
_SPLITS = ("train", "val")
_EIGHTHS = ((8, 4), (4, 8), (8, 8), (8, 3), (3, 8), (6, 8), (7, 3), (3, 7))
"""Heights and widths of the pictures if there are several sizes, in eighths of the longest edge."""
_MAX_OVERLAP = 0.4  # common area of two boxes over the smaller one
_MAX_COVERED = 0.55  # largest part of a box under all others together: several objects must not hide one


@dataclass(frozen=True)
class DemoSet:
    """How much is drawn, and of what difficulty."""

    hard: bool = False
    num_train: int = 2000
    num_val: int = 200
    size: int = 128
    several_sizes: bool = False


DEMO_SETS = {
    "easy": DemoSet(),
    "hard": DemoSet(hard=True),
    "tiny": DemoSet(num_train=22, num_val=8, size=96, several_sizes=True),
}
"""The sets that `data.draw_demo` names."""


@dataclass(frozen=True)
class DemoSettings:
    """All that the pixels depend on; kept in the `info` of the annotation files."""

    hard: bool = False
    """smaller objects and more of them, any rotation, scribbles between them"""
    size: int = 128
    """width and height of the pictures in pixels; the longest edge if there are several sizes"""
    seed: int = 0
    several_sizes: bool = False
    """tall and wide pictures and squares in turn"""

    def picture_size(self, index: int) -> tuple[int, int]:
        """Height and width in pixels of a picture."""
        height, width = _EIGHTHS[index % len(_EIGHTHS)] if self.several_sizes else (8, 8)
        return self.size * height // 8, self.size * width // 8

    @property
    def max_objects(self) -> int:
        """Objects in a picture, at most."""
        return 10 if self.hard else 7

    @property
    def radii(self) -> tuple[float, float]:
        """Smallest and largest radius of an object in pixels."""
        return (6.0 if self.hard else 10.0) * self.size / 128, 40.0 * self.size / 128

    @property
    def max_angle(self) -> float:
        """Largest rotation of an object in radians, either way."""
        return np.pi if self.hard else 0.35


def draw_demo(
    folder: Path,
    *,
    hard: bool = False,
    num_train: int = DEMO_SETS["easy"].num_train,
    num_val: int = DEMO_SETS["easy"].num_val,
    size: int = DEMO_SETS["easy"].size,
    several_sizes: bool = False,
    seed: int = 0,
    workers: int | None = None,
) -> bool:
    """Draw the demo data set: `train/`, `val/` and `annotations/train.json`, `annotations/val.json` (COCO).

    The annotation file of a split is written after its last image: a half-drawn split is drawn again by the next call,
    a complete one is left as it is.

    Args:
        folder: made where missing.
        hard: smaller objects, any rotation and more clutter.
        num_train: images to train on.
        num_val: images to evaluate on.
        size: width and height of the images in pixels; objects scale with it.
        several_sizes: some of the images are narrower, flatter or smaller than a full square.
        seed: seed of all randomness.
        workers: processes that draw, by default one a processor; their number does not change the pictures.

    Returns:
        False if the set was complete already.

    Raises:
        InputError: the folder holds another data set, or cannot be written.
    """
    settings = DemoSettings(hard=hard, size=size, seed=seed, several_sizes=several_sizes)
    wanted = dict(zip(_SPLITS, (num_train, num_val), strict=True))
    todo = [split for split, count in wanted.items() if not _is_complete(folder, split, count, settings)]
    try:
        for split in todo:
            (folder / split).mkdir(parents=True, exist_ok=True)
        for split in todo:
            _draw_split(folder, split, wanted[split], settings, workers)
    except OSError as error:
        raise InputError(f"{folder}: the demo data cannot be written: {error.strerror}") from error
    return bool(todo)


def _is_complete(folder: Path, split: str, count: int, settings: DemoSettings) -> bool:
    file = folder / "annotations" / f"{split}.json"
    if not file.exists():
        return False
    try:
        info = read_json(file)["info"]["megdet_demo"]
    except (InputError, KeyError, TypeError) as error:
        raise InputError(f"{file}: this is not the demo data; choose another folder or remove it") from error
    if not isinstance(info, dict) or {**info, "version": _VERSION} != _info(settings, count):
        raise InputError(f"{file}: demo data of other settings ({info}); choose another folder or remove it")
    if info["version"] != _VERSION:
        return False  # an older version: the same pictures, other annotations
    drawn = {entry.name for entry in (folder / split).glob("*.jpg")}
    return all(_file_name(index) in drawn for index in range(count))


def _info(settings: DemoSettings, count: int) -> dict[str, Any]:
    own = asdict(settings)
    if not settings.several_sizes:
        del own["several_sizes"]
    return {"version": _VERSION, "images": count, **own}


def _file_name(index: int) -> str:
    return f"{index:06d}.jpg"


def _draw_split(folder: Path, split: str, count: int, settings: DemoSettings, workers: int | None) -> None:
    draw = partial(_draw_file, folder / split, split, settings)
    if workers == 1 or count < 50:
        pictures = [draw(index) for index in range(count)]
    else:  # spawn: a fork of a process that runs torch's threads may hang
        try:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                pictures = list(pool.map(draw, range(count), chunksize=25))
        except BrokenProcessPool:
            raise InputError(
                f"{folder}: a process that draws pictures has ended; a script of your own must start its work under "
                "`if __name__ == '__main__':`, since every process reads it again; if memory ran out, draw with fewer "
                "workers"
            ) from None
    objects = [(index + 1, shape) for index, shapes in enumerate(pictures) for shape in shapes]
    write_coco(
        folder / "annotations" / f"{split}.json",
        head={"info": {"description": "shapes drawn by megdet data demo", "megdet_demo": _info(settings, count)}},
        images=[
            {"id": index + 1, "file_name": _file_name(index), "width": width, "height": height}
            for index, (height, width) in enumerate(map(settings.picture_size, range(count)))
        ],
        annotations=[
            {"id": number, "image_id": image_id, **shape, "iscrowd": 0}
            for number, (image_id, shape) in enumerate(objects, start=1)
        ],
        categories=[{"id": number, "name": name} for number, name in enumerate(CLASS_NAMES, start=1)],
    )


def _draw_file(folder: Path, split: str, settings: DemoSettings, index: int) -> list[dict[str, Any]]:
    pixels, shapes = draw_picture(settings, split, index)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92, subsampling=0)
    replace_file(folder / _file_name(index), file.getvalue(), durable=False)
    outlines = visible_parts(shapes, pixels.shape[:2])
    return [_annotation(shape, outline) for shape, outline in zip(shapes, outlines, strict=True)]


def _annotation(shape: Shape, visible: Any) -> dict[str, Any]:
    """Box and area are those of the whole shape, so that box scores mean the same with and without occlusion."""
    x1, y1, x2, y2 = shape.box.tolist()
    return {
        "category_id": CLASS_NAMES.index(shape.name) + 1,
        "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
        "area": round(shape.area, 2),
        "segmentation": visible,
    }


def draw_picture(settings: DemoSettings, split: str, index: int) -> tuple[NDArray[np.uint8], list[Shape]]:
    """One picture, (height, width, 3) RGB, and its objects from back to front."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((settings.seed, _SPLITS.index(split), index))))
    height, width = settings.picture_size(index)
    shapes = _arrange(settings, np.array([width, height]), random)
    canvas, colors = _background(settings.size, random)
    canvas = canvas[:height, :width]
    if settings.hard:
        _scribble(canvas, colors, random)
    for shape in shapes:
        color = _contrasting(colors, random)
        paint(canvas, shape, color, random)
        colors = np.concatenate([colors, color[None]])
    canvas += random.normal(0, random.uniform(0.005, 0.03), canvas.shape).astype(np.float32)
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8), shapes


def _arrange(settings: DemoSettings, edges: NDArray[np.int64], random: np.random.Generator) -> list[Shape]:
    """Shapes inside a picture of this width and height, overlapping by no more than `_has_room` allows."""
    shapes: list[Shape] = []
    smallest, largest = settings.radii
    largest *= edges.min() / settings.size
    for _ in range(random.integers(1, settings.max_objects + 1)):
        name = CLASS_NAMES[random.integers(len(CLASS_NAMES))]
        radius, stretch = np.exp(random.uniform(np.log(smallest), np.log(largest))), np.exp(random.uniform(-0.18, 0.18))
        angle = random.uniform(-settings.max_angle, settings.max_angle)
        for _attempt in range(30):
            shape = place(name, radius, angle, stretch, np.zeros(2))
            margin = shape.box[2:] + 1
            if (2 * margin < edges).all():
                shape = place(name, radius, angle, stretch, random.uniform(margin, edges - margin))
                if _has_room(shape.box, [other.box for other in shapes]):
                    shapes.append(shape)
                    break
            radius *= 0.97  # a smaller shape fits more easily into a full picture
            if radius < smallest:
                break
    return shapes


def _has_room(box: NDArray[np.float64], others: list[NDArray[np.float64]]) -> bool:
    """Whether a box may join the others."""
    boxes = np.stack([*others, box])
    low, high = boxes[:, :2], boxes[:, 2:]
    common = (np.minimum(high[:, None], high) - np.maximum(low[:, None], low)).clip(0, None).prod(axis=2)
    areas = common.diagonal()
    of_smaller = common[-1, :-1] / np.minimum(areas[:-1], areas[-1])
    covered = (common.sum(axis=1) - areas) / areas
    return bool((of_smaller <= _MAX_OVERLAP).all() and (covered <= _MAX_COVERED).all())


def _hsv(hue: NDArray[np.float64], saturation: NDArray[np.float64], value: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 3): red, green, blue of n colours given as hue, saturation and value of 0..1."""
    ramps = np.abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return np.asarray(value[:, None] * (1 - saturation[:, None] * (1 - ramps.clip(0, 1))))


def _contrasting(colors: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    """A random colour that stands out from all of `colors`: the first that is far enough, else the farthest of 24."""
    choices = _hsv(*random.uniform([[0.0], [0.15], [0.25]], [[1.0], [0.95], [1.0]], (3, 24)))
    # Brightness counts double: outlines are seen by it, and JPEG keeps it best.
    luma = np.array([0.3, 0.59, 0.11])
    difference = choices[:, None] - colors[None]
    distance = np.sqrt((difference**2).mean(axis=2) + (difference @ luma) ** 2)
    weight = np.where(np.arange(len(colors)) < 2, 1.0, 1.6)  # the two background colours matter more than other shapes
    nearest = (distance * weight).min(axis=1)
    good = np.flatnonzero(nearest > 0.33)
    return np.asarray(choices[good[0] if len(good) else nearest.argmax()])


def _background(size: int, random: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A textured picture between two related colours, and these colours."""
    first = random.uniform([0.0, 0.05, 0.12], [1.0, 0.6, 0.95])
    step = random.uniform([-0.1, -0.15, 0.08], [0.1, 0.15, 0.2]) * [1, 1, random.choice([-1, 1])]
    second = (first + step).clip([-1.0, 0.0, 0.05], [2.0, 0.65, 1.0])
    colors = _hsv(*np.stack([first, second], axis=1))
    x, y = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size))
    angle = random.uniform(0, 2 * np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = random.integers(6)
    if kind == 0:
        mix = 0.5 + 0.4 * along
    elif kind == 1:
        mix = np.hypot(x - random.uniform(-0.7, 0.7), y - random.uniform(-0.7, 0.7)) / 1.6
    elif kind == 2:
        mix = sum(_clouds(size, cells, random) / cells for cells in (3, 6, 12, 24)) * 3.2
    elif kind == 3:
        mix = 0.5 + 0.5 * np.tanh(2 * np.sin(along * random.uniform(8, 28) + 0.6 * np.sin(across * 4)))
    elif kind == 4:
        waves = random.uniform(6, 16)
        mix = 0.5 + 0.5 * np.tanh(4 * np.sin(along * waves) * np.sin(across * waves))
    else:
        mix = 0.5 + 0.5 * np.tanh(6 * (_clouds(size, int(random.integers(5, 11)), random) - 0.5))
    mix = 0.8 * mix + 0.25 * (_clouds(size, 4, random) - 0.4)
    mix = mix + random.uniform(0, 0.12) * _clouds(size, size // 2, random)
    canvas = colors[0] + (colors[1] - colors[0]) * mix.clip(0, 1)[:, :, None]
    return canvas.astype(np.float32), colors


def _clouds(size: int, cells: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Value noise of 0..1 with a number of cells along each side."""
    grid = Image.fromarray(random.random((cells + 1, cells + 1)).astype(np.float32))
    clouds = np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC), np.float64)
    return np.clip(clouds, 0, 1)


def _scribble(canvas: NDArray[np.float32], colors: NDArray[np.float64], random: np.random.Generator) -> None:
    """Draw lines and blots that are not objects."""
    height, width = canvas.shape[:2]
    size = max(height, width)
    for _ in range(random.integers(4, 12)):
        image = Image.new("L", (width * 2, height * 2))
        steps = random.normal(0, size / 9, (random.integers(3, 7), 2))
        points = random.uniform(0, 2 * size, 2) + steps.cumsum(axis=0)
        line = [tuple(point) for point in points.tolist()]
        ImageDraw.Draw(image).line(line, fill=255, width=int(random.integers(2, 8)), joint="curve")
        mask = np.asarray(image.reduce(2), np.float32)[:, :, None] / 255
        canvas += (_contrasting(colors, random) - canvas) * mask * random.uniform(0.4, 0.9)
