"""What a plan holds: groups of images, and what is done to each image."""

from dataclasses import dataclass
from typing import NamedTuple

from megdet.recipe import ResizeKind


class Window(NamedTuple):
    """The part of an image file that is used, before it is resized."""

    corner: tuple[int, int]
    """y and x of its upper left corner in pixels of the file"""
    size: tuple[int, int]
    """height and width in pixels of the file"""
    least_area: float
    """part of a box's area that must be left for it to be a target"""


class Crop(NamedTuple):
    """What is cut out of a resized image."""

    whole: tuple[int, int]
    """height and width in pixels of the resized image"""
    corner: tuple[int, int]
    """y and x of the crop's upper left corner in the resized image"""
    least_area: float
    """part of a box's area that must be left for it to be a target"""


@dataclass(frozen=True)
class PlannedImage:
    """One image of a group and what is done to it."""

    index: int
    """its index in the data set"""
    epoch: int
    seed: int
    """signed 64-bit hash of (recipe seed, epoch, index, copy); all randomness of the image comes from it"""
    size: tuple[int, int]
    """height and width in pixels on the canvas, after resizing and cropping"""
    flip_horizontal: bool = False
    flip_vertical: bool = False
    resize: ResizeKind = "antialias"
    """filter with which the image is resized"""
    crop: Crop | None = None
    """what is cut out of the resized image, before it is flipped"""
    window: Window | None = None
    """the part of the file that is resized; None for all of it"""
    tiles: tuple["Tile", ...] = ()
    """the images of which the picture is made instead, as a mosaic; this one is among them"""
    paste: "Paste | None" = None
    """what is pasted onto the picture when it is cut and flipped, or put together"""

    @property
    def sources(self) -> tuple["PlannedImage", ...]:
        """The image itself and its partners, which are read for the picture."""
        return (self, *(tile.image for tile in self.tiles), *((self.paste.source,) if self.paste else ()))

    @property
    def indices(self) -> tuple[int, ...]:
        """The images of the data set that are read for the picture."""
        return tuple(source.index for source in self.sources)

    @property
    def resized(self) -> tuple[int, int]:
        """Height and width in pixels of the whole image, or of its window, after resizing."""
        return self.crop.whole if self.crop else self.size


@dataclass(frozen=True)
class Tile:
    """One image of a mosaic."""

    image: PlannedImage
    """prepared like any image, as large as its part of the picture"""
    corner: tuple[int, int]
    """y and x of its upper left corner in the picture"""


@dataclass(frozen=True)
class Paste:
    """Objects of another image that are pasted onto one."""

    source: PlannedImage
    """the other image, prepared like any image; some of its objects are drawn by its seed"""
    corner: tuple[int, int]
    """y and x of the source's upper left corner in the image, in pixels; negative where the source is larger"""
    least_area: float
    """part of an object that must be seen for it to be a target: of a hidden one, and of one cut at the edge"""


@dataclass(frozen=True)
class PlannedGroup:
    """Images that share one canvas and, in training, one set of batch statistics."""

    canvas: tuple[int, int]
    """height and width in pixels"""
    images: tuple[PlannedImage, ...]
