"""Pixels of an image file as a viewer shows them: RGB, 8 bits, EXIF orientation applied.

Pillow may read only the formats in `FORMATS`, whatever a file is called: some of its readers start other programs. A
plain JPEG is decoded by simplejpeg: the same libjpeg-turbo and the same pixels, without Pillow's copies through four
channels and strings. torchvision's decoder is deprecated since 0.29; its successor torchcodec is as fast, but tied to
versions of torch.
"""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from megdet.data.far.folder import FarFile
from megdet.data.far.opening import far_content, forget
from megdet.data.room import Room
from megdet.errors import InputError
from megdet.recipe import Data

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
"""File name endings, in lower case, by which images are found in a folder."""

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF")
"""Pillow's names of the formats that are opened."""

MAX_PIXELS = Data.max_pixels
"""Pixels of the largest image that is decoded by default."""

_ROOM = Room(MAX_PIXELS)
"""Limits what the threads that call `whole_header` decode at the same time."""

_BAND_PIXELS = 1 << 20
"""Pixels of a band of rows, which are converted together."""

_MOST_SCANS_PIXELS = 16 * MAX_PIXELS
"""Largest scans x pixels of a JPEG: each scan takes the time of the whole picture; a progressive JPEG has ten."""

_SIZED_AT_THE_BEGINNING = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"P5", b"P6")
"""First bytes of the formats whose size and EXIF stand before the pixels; those of TIFF and WebP may stand behind."""

_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82"}
"""The last bytes of a whole file, by format; other bytes may follow the picture."""


ImageSource: TypeAlias = Path | str | BytesIO | FarFile


class Header(NamedTuple):
    """What is known of an image without decoding it."""

    height: int
    """pixels as displayed"""
    width: int
    """pixels as displayed"""
    is_swapped: bool
    """whether the EXIF orientation is a quarter turn, so that the file stores the picture as width x height"""


def image_size(path: Path | str) -> tuple[int, int]:
    """Height and width in pixels as displayed, from the header alone.

    Raises:
        InputError: the file is missing or is no image.
    """
    height, width, _ = read_header(path)
    return height, width


def read_header(source: ImageSource) -> Header:
    """The header of an image file or an open file; EXIF is found only if it comes before the pixels.

    Raises:
        InputError: the file is missing or is no image.
    """
    with _opened(Path(source) if isinstance(source, str) else source) as (image, _):
        return _header(image)


def whole_header(source: Path | str | BytesIO) -> Header:
    """The header of an image file or an open file, which must not be truncated.

    A JPEG or PNG without the right last bytes is decoded to find out, if it has at most MAX_PIXELS; truncation of other
    formats is not noticed.

    Raises:
        InputError: the file is missing, is no image or is truncated.
    """
    with _opened(Path(source) if isinstance(source, str) else source) as (image, file):
        header, end = _header(image), _ENDS.get(image.format or "", b"")
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(end)))
        has_end = file.read() == end if end else True
    if not has_end and header.height * header.width <= MAX_PIXELS:
        with _ROOM.taken(header.height * header.width):
            read_image(source)
    return header


def header_of_beginning(content: bytes, *, is_whole: bool) -> Header | None:
    """The header of an image of which only the first bytes are at hand; None if more of them are needed.

    All bytes are needed of formats whose size or EXIF may stand anywhere. With `is_whole` it is `whole_header`.

    Raises:
        InputError: these are all bytes, and they are no image or a truncated one.
    """
    if is_whole:
        return whole_header(BytesIO(content))
    if not content.startswith(_SIZED_AT_THE_BEGINNING):
        return None
    try:
        return read_header(BytesIO(content))
    except InputError:
        return None


def read_image(
    source: ImageSource, *, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """The picture as (height, width, 3) RGB of 8 bits, turned by its EXIF orientation.

    Gray is repeated over the channels; transparent pixels show white behind them, as on a page; CMYK is converted
    (Adobe's inverted kind too); 16 bits are scaled by 1/257, not cut off. Float pixels are taken as 0..1 where none is
    above 1, else as 0..255. Of an animation the first frame is read.

    Args:
        source: path of the file, a file at an address, or an open file.
        size: the height and width that the image must have; `max_pixels` is then not checked.
        max_pixels: the largest height x width that is decoded.

    Raises:
        InputError: the file is missing, truncated, no image, of another size or too large, or has pixels that are not
            finite or out of range.
    """
    with _opened(Path(source) if isinstance(source, str) else source) as (image, file):
        header = _header(image)
        if size is not None and size != header[:2]:
            raise InputError(f"the file is {header.width} x {header.height} pixels now, it was {size[1]} x {size[0]}")
        fault = pixels_fault(header.height, header.width, max_pixels) if size is None else ""
        if fault:
            raise InputError(fault)
        if image.format in ("JPEG", "MPO"):
            _refuse_endless_scans(file, header)
        orientation = 1 if image.format == "TIFF" else _orientation(image)
        is_plain_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
        pixels = _decode_jpeg(file) if is_plain_jpeg else None
        if pixels is None:
            pixels = _to_rgb(image)
    return np.ascontiguousarray(_turn(pixels, orientation))


def pixels_fault(height: int, width: int, max_pixels: int) -> str:
    """What is wrong with an image of this size if at most `max_pixels` are decoded; empty if nothing."""
    if height * width <= max_pixels:
        return ""
    return (
        f"{width} x {height} pixels are more than data.max_pixels {max_pixels} lets be decoded: cut or shrink the "
        "image, or raise the key"
    )


def kind_fault(mode: int) -> str:
    """Why a file of this `st_mode` is not opened as an image (a pipe would block); empty for a regular file."""
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    if stat.S_ISREG(mode):
        return ""
    return f"it is {next((name for is_kind, name in kinds if is_kind(mode)), 'a device')}, no image file"


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of a Pillow image in the form of `read_image`, EXIF orientation applied.

    Raises:
        InputError: it cannot be decoded, or its pixels are not finite or out of range.
    """
    try:
        return np.ascontiguousarray(_turn(_to_rgb(image), _orientation(image)))
    except InputError as error:
        raise InputError(f"the image: {error}") from None
    except (OSError, SyntaxError) as error:
        raise InputError(f"the image: its file cannot be decoded ({error}); replace the file") from error


@contextmanager
def _opened(source: Path | BytesIO | FarFile) -> Iterator[tuple[Image.Image, BufferedReader | BytesIO]]:
    """An image whose header is read, and its file; errors in the `with` block become an InputError with the path."""
    path = "the image" if isinstance(source, BytesIO) else source
    try:
        if isinstance(source, Path):
            fault = kind_fault(source.stat().st_mode)
            if fault:
                raise InputError(fault)
        with ExitStack() as opened:
            file: BufferedReader | BytesIO
            if isinstance(source, Path):
                file = opened.enter_context(source.open("rb"))
            else:
                file = source if isinstance(source, BytesIO) else BytesIO(far_content(source))
            image = opened.enter_context(Image.open(file, formats=FORMATS))
            yield image, file
    except InputError as error:
        _forget_copy(source)
        raise InputError(f"{path}: {error}") from None
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such image file") from error
    except MemoryError:
        raise  # not the file's fault
    except Exception as error:  # Pillow's readers raise anything at all on a damaged file
        _forget_copy(source)
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is none of {', '.join(FORMATS)}"
        raise InputError(f"{path}: cannot be read as an image ({reason}); replace the file") from error


def _forget_copy(source: Path | BytesIO | FarFile) -> None:
    """Let a far file be fetched anew when it is read next: its server may have a sound one by then."""
    if isinstance(source, FarFile):
        forget(source)


def _header(image: Image.Image) -> Header:
    width, height = image.size
    is_swapped = _orientation(image) in (5, 6, 7, 8)
    if is_swapped and image.format != "TIFF":  # only for TIFF does Pillow itself rotate size and pixels
        height, width = width, height
    return Header(height, width, is_swapped)


def _orientation(image: Image.Image) -> int:
    try:
        # The method of the base class: that of a PNG decodes the whole picture in search of EXIF behind the pixels.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF is damaged, the picture may still be sound
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


def _refuse_endless_scans(file: BufferedReader | BytesIO, header: Header) -> None:
    """Raise InputError for a JPEG that would take minutes: a hundred bytes can be one more pass over all pixels."""
    file.seek(0)
    scans = file.read().count(b"\xff\xda")
    if scans * header.height * header.width > _MOST_SCANS_PIXELS:
        raise InputError(f"a JPEG of {scans} scans, where ten are usual; write it again with another program")


def _decode_jpeg(file: BufferedReader | BytesIO) -> NDArray[np.uint8] | None:
    """The pixels of a plain JPEG without faults; None for any other file, which is left to Pillow."""
    file.seek(0)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(file.read(), "RGB")
    except ValueError:
        return None
    return pixels


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """RGB pixels, converted band by band: Pillow's intermediate forms need up to eight bytes a pixel."""
    is_wide, is_float = image.mode.startswith("I;16") or image.mode == "I", image.mode == "F"
    largest = _largest(image) if is_wide or is_float else 255
    scale = 255.0 if largest <= 1 else 1.0
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top, band in _bands(image):
        own = pixels[top : top + band.height]
        if is_wide:
            own[:] = ((np.asarray(band).astype(np.int64) + 128) // 257)[:, :, None]
        elif is_float:
            own[:] = (np.asarray(band) * scale + 0.5)[:, :, None]
        elif image.has_transparency_data:
            layer = band.convert("RGBA")
            white = Image.new("RGBA", layer.size, "white")
            own[:] = np.asarray(Image.alpha_composite(white, layer).convert("RGB"))
        else:
            own[:] = np.asarray(band.convert("RGB"))
    return pixels


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Bands of neighbouring rows of a picture, each with the index of its first row."""
    image.load()
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _largest(image: Image.Image) -> float:
    """The largest value of pixels of more than 8 bits. Raises InputError for values out of range."""
    low, high = math.inf, -math.inf
    for _, band in _bands(image):
        values = np.asarray(band)
        if not np.isfinite(values).all():
            raise InputError("some pixels are NaN or infinite; convert the file to 8 or 16 bits")
        low, high = min(low, values.min().item()), max(high, values.max().item())
    if image.mode != "F" and (low < 0 or high > 65535):
        raise InputError(f"pixels from {low} to {high} do not fit 16 bits; convert the file")
    if image.mode == "F" and (low < 0 or high > 255):
        raise InputError(f"float pixels from {low:g} to {high:g} are neither 0..1 nor 0..255; convert the file")
    return float(high)
