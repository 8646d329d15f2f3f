"""Images as a program has them, turned into pixels: paths, addresses, Pillow's images, arrays, tensors."""

import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO, IOBase
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor

from megdet.addresses import is_address
from megdet.data.far.folder import FarFile, FarFolder, folder_of
from megdet.data.image import IMAGE_SUFFIXES, pixels_fault, pixels_of, read_image
from megdet.errors import InputError

Image: TypeAlias = str | Path | PillowImage.Image | NDArray[np.uint8] | Tensor
"""A path, an address (http, https, file, s3, zip and others that fsspec knows), an image of Pillow's, an array (height,
width, 3) or (height, width) of 8 bits, or a tensor (3, height, width) of 8 bits or of floats from 0 to 1; colours are
in the order RGB."""

MOST_BYTES = 64 << 20
"""Of a file that is fetched from an address."""
_SECONDS = 30
_WANTED = "give a path, an address, an array, a tensor or an image of Pillow's"
_OVERSHOOT, _OVERSHOT = 0.25, 0.1
"""So far may floats leave the range from 0 to 1, and so large a part: resizing overshoots at edges and rounds."""
_HALF_STEP = 0.5 / 255
"""What rounding to 8 bits forgets."""


class Pixels(NamedTuple):
    """One image."""

    values: NDArray[np.uint8]
    """(height, width, 3) RGB"""
    source: str
    """its path or address, or nothing"""
    is_file: bool
    """whether it can be read again from its source"""


def is_one_image(images: Any) -> bool:
    """Whether it is a single image, not several of them. A folder is several."""
    if isinstance(images, str | Path):
        return not Path(images).is_dir()
    return isinstance(images, PillowImage.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim in (2, 3))


def each_image(images: Any) -> Iterator[Image]:
    """The images one by one: those of a folder by name, those of a list, an array or a tensor in their order.

    Raises InputError for what is neither an image nor several.
    """
    if is_one_image(images):
        yield images
    elif isinstance(images, str | Path):
        inside = sorted(file for file in Path(images).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not inside:
            raise InputError(f"{images}: no image in this folder")
        yield from inside
    else:
        yield from _several(images)


def _several(images: Any) -> Iterator[Image]:
    if not isinstance(images, bytes | bytearray | IOBase):
        with suppress(TypeError):  # also of an array without dimensions, which has an __iter__
            return iter(images)
    raise InputError(f"something of type {type(images).__name__} is no image, and not several: {_WANTED}")


def pixels_of_any(image: Any, max_pixels: int) -> Pixels:
    """The pixels of one image. Raises InputError for a file that cannot be read and for what is no image."""
    if isinstance(image, str) and urllib.parse.urlsplit(image).scheme in ("http", "https"):
        return Pixels(_fetched(image, max_pixels), image, is_file=False)
    if isinstance(image, str) and image.startswith("file:"):
        image = Path(urllib.request.url2pathname(urllib.parse.urlsplit(image).path))
    elif isinstance(image, str) and is_address(image):
        return Pixels(read_image(_far_file(image), max_pixels=max_pixels), image, is_file=False)
    if isinstance(image, str | Path):
        return Pixels(read_image(image, max_pixels=max_pixels), str(image), is_file=True)
    if isinstance(image, PillowImage.Image):
        if not image.width * image.height:
            raise InputError(f"an image of {image.width} x {image.height} pixels has none")
        if fault := pixels_fault(image.height, image.width, max_pixels):
            raise InputError(f"the image: {fault}")
        return Pixels(pixels_of(image), str(getattr(image, "filename", "")), is_file=False)
    if isinstance(image, Tensor):
        return Pixels(_of_tensor(image), "", is_file=False)
    if isinstance(image, np.ndarray):
        return Pixels(_of_array(image), "", is_file=False)
    raise InputError(f"something of type {type(image).__name__} is no image: {_WANTED}")


def _far_file(address: str) -> FarFile:
    folder = folder_of(address)
    assert isinstance(folder, FarFolder)  # an address of a local file was taken for its path before
    return folder.as_file()


def _fetched(address: str, max_pixels: int) -> NDArray[np.uint8]:
    request = urllib.request.Request(address, headers={"User-Agent": "megdet"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            content = answer.read(MOST_BYTES + 1)
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise InputError(f"{address}: cannot be fetched ({error})") from None
    if len(content) > MOST_BYTES:
        raise InputError(f"{address}: more than {MOST_BYTES >> 20} MiB: fetch it yourself and give its path")
    try:
        return read_image(BytesIO(content), max_pixels=max_pixels)
    except InputError as error:
        raise InputError(f"{address}: {str(error).removeprefix('the image: ')}") from None


def cut_to_unit(values: Tensor, where: str) -> Tensor:
    """The floats of an image, those a little out of 0 to 1 cut there. Raises InputError for those of another range."""
    cut = values.clamp(0, 1)
    is_out = ((values - cut).abs() > _HALF_STEP).float().mean()
    low, high, out = torch.stack((*values.aminmax(), is_out)).tolist()  # together: a GPU is waited for once
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT and out <= _OVERSHOT):
        raise InputError(
            f"{where}: floats from 0 to 1 are needed, found {low:g} to {high:g}, {out:.0%} of them outside: divide "
            "bytes by 255, leave out the normalisation, which the network does, and cut what noise adds by clamp(0, 1)"
        )
    return cut


def _of_tensor(image: Tensor) -> NDArray[np.uint8]:
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        raise InputError(f"a tensor of shape {tuple(image.shape)} is no image: it is (3, height, width)")
    values = image.detach().cpu()
    if values.is_floating_point():
        values = (cut_to_unit(values.float(), "the image") * 255).round().byte()
    if values.dtype != torch.uint8:
        raise InputError(f"a tensor of {values.dtype} is no image: it has 8 bits (torch.uint8), or floats from 0 to 1")
    return _of_array(values.permute(1, 2, 0).numpy())


def _of_array(image: NDArray[Any]) -> NDArray[np.uint8]:
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise InputError(f"an array of shape {image.shape} is no image: it is (height, width, 3), in the order RGB")
    if image.dtype != np.uint8:
        raise InputError(f"an array of {image.dtype} is no image: it has numbers of 8 bits (numpy.uint8), 0 to 255")
    return np.require(np.broadcast_to(image, (*image.shape[:2], 3)), requirements=["C", "W"])
