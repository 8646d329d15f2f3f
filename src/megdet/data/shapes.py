"""The outlines of the demo data's classes, and how a shape is painted into a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from megdet.data.masks import place_mask
from megdet.data.rle import encode_mask
from megdet.data.segmentations import Segmentation

SUPERSAMPLING = 4
"""factor by which masks are drawn larger and then averaged, for smooth edges"""

_PAINT_MARGIN = 8  # pixels around a box that its shadow reaches
_RING_SPLIT = 49  # points of a ring's outer circle, the rest are its inner one


def _around(radii: NDArray[np.float64], start: float = -np.pi / 2) -> NDArray[np.float64]:
    angles = start + np.arange(len(radii)) * (2 * np.pi / len(radii))
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _arc(centre_x: float, radius: float, first: float, last: float, points: int) -> NDArray[np.float64]:
    angles = np.linspace(first, last, points)
    return np.stack([centre_x + radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _cross() -> NDArray[np.float64]:
    arm, reach = 0.3, 0.95
    quarter = np.array([[arm, -reach], [arm, -arm], [reach, -arm]])
    turns = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in np.arange(4) * np.pi / 2]
    return np.concatenate([quarter @ turn.T for turn in turns])


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 16.0


def _crescent() -> NDArray[np.float64]:
    # The points common to the unit circle and to the circle of radius 0.83 around (0.5, 0).
    x = (1 - 0.83**2 + 0.25) / 1.0
    outer, inner = np.arccos(x), np.arccos((x - 0.5) / 0.83)
    outside, inside = _arc(0.0, 1.0, outer, 2 * np.pi - outer, 40), _arc(0.5, 0.83, 2 * np.pi - inner, inner, 30)
    return np.asarray(np.concatenate([outside, inside[1:-1]]) + np.array([0.2, 0.0]))


def _ring() -> NDArray[np.float64]:
    # One polygon: round outside, along a seam, back inside; the seam has no width.
    return np.concatenate([_arc(0.0, 1.0, 0.0, 2 * np.pi, _RING_SPLIT), _arc(0.0, 0.58, 2 * np.pi, 0.0, 37)])


OUTLINES: dict[str, NDArray[np.float64]] = {
    "circle": _around(np.ones(48)),
    "square": _around(np.full(4, 1.2), -np.pi / 4),
    "triangle": _around(np.full(3, 1.15)) + np.array([0.0, 0.2]),
    "star": _around(np.tile([1.1, 0.46], 5)),
    "ring": _ring(),
    "cross": _cross(),
    "heart": _heart(),
    "crescent": _crescent(),
}
"""class name: (points, 2) polygon of about unit radius around the origin, y down"""


@dataclass(frozen=True)
class Shape:
    """One object of a demo picture."""

    name: str
    polygon: NDArray[np.float64]
    """(points, 2): x, y in pixels"""

    @property
    def box(self) -> NDArray[np.float64]:
        """(4,): x1, y1, x2, y2 in pixels, tight around the whole polygon."""
        return np.concatenate([self.polygon.min(axis=0), self.polygon.max(axis=0)])

    @property
    def loops(self) -> list[NDArray[np.float64]]:
        """The closed lines around the shape: two for a ring, else one."""
        return np.split(self.polygon, [_RING_SPLIT]) if self.name == "ring" else [self.polygon]

    @property
    def area(self) -> float:
        """Square pixels inside the polygon (the hole of a ring is outside)."""
        x, y = self.polygon.T
        return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def visible_parts(shapes: Sequence[Shape], size: tuple[int, int]) -> list[Any]:
    """The `segmentation` of shapes from back to front: a polygon if it is not hidden, else its visible pixels (RLE)."""
    is_covered, found = np.zeros(size, np.bool_), []
    for shape in reversed(shapes):
        mask = np.zeros(size, np.bool_)
        outline = Segmentation((shape.polygon.astype(np.float32),), np.zeros(0, np.int32))
        x, y, own = place_mask(outline, size, size)
        mask[y : y + own.shape[0], x : x + own.shape[1]] = own
        is_whole = not (mask & is_covered).any()
        found.append([shape.polygon.ravel().tolist()] if is_whole else encode_mask(mask & ~is_covered, 0, 0, size))
        is_covered |= mask
    return found[::-1]


def place(name: str, radius: float, angle: float, stretch: float, centre: NDArray[np.float64]) -> Shape:
    """A shape of a radius in pixels, made `stretch` times wider and as much flatter, then turned by `angle` radians."""
    scaled = OUTLINES[name] * radius * np.array([stretch, 1 / stretch])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    polygon = scaled @ turn.T
    middle = (polygon.min(axis=0) + polygon.max(axis=0)) / 2
    return Shape(name, np.round(polygon - middle + centre, 2))


def paint(canvas: NDArray[np.float32], shape: Shape, color: NDArray[np.float64], random: np.random.Generator) -> None:
    """Paint a shape into a float picture of 0..1 in place: a soft shadow, a lit fill, sometimes a pattern and a rim."""
    low, high = np.floor(shape.box[:2]) - _PAINT_MARGIN, np.ceil(shape.box[2:]) + _PAINT_MARGIN
    left, top, right, bottom = np.concatenate([low.clip(0), high.clip(0, canvas.shape[1::-1])]).astype(int).tolist()
    canvas = canvas[top:bottom, left:right]  # a view: the rest stays as it is
    shape = Shape(shape.name, shape.polygon - np.array([left, top]))
    height, width = canvas.shape[:2]
    mask = coverage(shape, height, width)

    shadow = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))
    dx, dy = random.integers(1, 4, 2)
    shade = np.asarray(shadow, np.float32)[:-dy, :-dx] * np.float32(random.uniform(0.15, 0.4) / 255)
    canvas[dy:, dx:] *= 1 - shade[:, :, None]

    fill = color * (1 + _light(shape, height, width, random)[:, :, None])
    if random.random() < 0.4:
        rim = np.clip(color * random.choice([0.55, 1.45]), 0, 1)
        core = coverage(shape, height, width, rim_width=random.uniform(1.0, 2.5))
        fill = rim + (fill - rim) * core[:, :, None]
    canvas += (fill - canvas) * mask[:, :, None]


def _light(shape: Shape, height: int, width: int, random: np.random.Generator) -> NDArray[np.float64]:
    """(height, width): how much brighter than its colour a shape is, with stripes or grain on every second one."""
    x, y = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    x1, y1, x2, y2 = shape.box
    towards = random.uniform(0, 2 * np.pi)
    light: NDArray[np.float64] = (x - (x1 + x2) / 2) * np.cos(towards) + (y - (y1 + y2) / 2) * np.sin(towards)
    light *= random.uniform(0.06, 0.32) / max(x2 - x1, y2 - y1)
    kind = random.integers(4)
    if kind == 0:
        across, period = random.uniform(0, np.pi), random.uniform(4, 9)
        light += 0.07 * np.sin((x * np.cos(across) + y * np.sin(across)) * (2 * np.pi / period))
    elif kind == 1:
        light += random.normal(0, 0.05, x.shape)
    return light


def coverage(shape: Shape, height: int, width: int, rim_width: float = 0.0) -> NDArray[np.float32]:
    """(height, width): how much of each pixel a shape covers, 0..1, without a rim of some pixels where asked for."""
    image = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    loops = [[tuple(point) for point in (loop * SUPERSAMPLING - 0.5).tolist()] for loop in shape.loops]
    for loop, fill in zip(loops, (255, 0), strict=False):  # the second is the hole
        draw.polygon(loop, fill=fill)
    if rim_width:
        for loop in loops:
            draw.line([*loop, loop[0]], fill=0, width=round(2 * rim_width * SUPERSAMPLING), joint="curve")
    return np.asarray(image.reduce(SUPERSAMPLING), np.float32) / np.float32(255)
