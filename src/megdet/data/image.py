"""Pixels of a file as everybody sees them: RGB, 8 bits, turned as the camera's EXIF note says.

Pillow reads everything. The pixels of a plain JPEG are decoded by simplejpeg: the same libjpeg-turbo and the same
pixels, without Pillow's detour over four channels and strings. torchvision's decoder is deprecated since 0.29; its
successor torchcodec is as fast, but tied to versions of torch.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image

from megdet.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
"""File name endings, in lower case, that count as images where a folder is searched."""


class Header(NamedTuple):
    """What is known of an image without decoding it."""

    height: int
    """pixels as displayed"""
    width: int
    """pixels as displayed"""
    is_swapped: bool
    """the EXIF orientation turns the picture by a quarter: the file stores it as width x height"""


def image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels as displayed, from the header alone.

    Raises:
        InputError: the file is missing or is no image.
    """
    height, width, _ = read_header(path)
    return height, width


def read_header(path: Path) -> Header:
    """The header of an image file; EXIF is seen where it stands before the pixels.

    Raises:
        InputError: the file is missing or is no image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            is_swapped = _orientation(image) in (5, 6, 7, 8)
            is_upright = image.format == "TIFF"  # the one format of which Pillow turns the size and the pixels
    except Exception as error:  # Pillow's readers raise anything at all on a damaged file
        raise _unreadable(path, error) from error
    if is_swapped and not is_upright:
        height, width = width, height
    return Header(height, width, is_swapped)


def read_image(path: Path) -> NDArray[np.uint8]:
    """The picture as (height, width, 3) RGB of 8 bits, turned by its EXIF orientation.

    Gray is repeated over the channels; transparent pixels show white behind them, as on a page; CMYK is converted
    (Adobe's inverted kind too); 16 bits are scaled by 1/257, not cut off. Float pixels are taken as 0..1 where none is
    above 1, else as 0..255. Of an animation the first frame is read.

    Raises:
        InputError: the file is missing, truncated, no image, or has pixels that are not finite or out of range.
    """
    try:
        with Image.open(path) as image:
            orientation = 1 if image.format == "TIFF" else _orientation(image)
            is_plain_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
            pixels = _decode_jpeg(path) if is_plain_jpeg else None
            if pixels is None:
                pixels = _to_rgb(image)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # Pillow's readers raise anything at all on a damaged file
        raise _unreadable(path, error) from error
    return np.ascontiguousarray(_turn(pixels, orientation))


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such image file")
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{path}: cannot be read as an image ({reason}); replace the file or remove it from the data")


def _orientation(image: Image.Image) -> int:
    try:
        # The method of the base class: that of a PNG decodes the whole picture in search of EXIF behind the pixels.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged note says nothing, the picture may still be sound
        return 1


def _turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo EXIF orientation 2 to 8; any other number means upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _decode_jpeg(path: Path) -> NDArray[np.uint8] | None:
    """The pixels of a plain JPEG without fault; of any other Pillow says whether it is a picture, and why not."""
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(path.read_bytes(), "RGB")
    except ValueError:
        return None
    return pixels


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16") or image.mode == "I":
        return _gray(_from_16_bits(np.asarray(image)))
    if image.mode == "F":
        return _gray(_from_float(np.asarray(image)))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return np.array(Image.alpha_composite(white, layer).convert("RGB"))
    return np.array(image.convert("RGB"))


def _gray(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(pixels[:, :, None], 3, axis=2)


def _from_16_bits(pixels: NDArray[np.integer]) -> NDArray[np.uint8]:
    wide = pixels.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise InputError(f"pixels from {wide.min()} to {wide.max()} do not fit 16 bits; convert the file")
    return ((wide + 128) // 257).astype(np.uint8)


def _from_float(pixels: NDArray[np.floating]) -> NDArray[np.uint8]:
    if not np.isfinite(pixels).all():
        raise InputError("some pixels are NaN or infinite; convert the file to 8 or 16 bits")
    if pixels.min() < 0 or pixels.max() > 255:
        raise InputError(
            f"float pixels from {pixels.min():g} to {pixels.max():g} are neither 0..1 nor 0..255; convert the file"
        )
    scale = 255.0 if pixels.max() <= 1 else 1.0
    return (pixels * scale + 0.5).astype(np.uint8)
