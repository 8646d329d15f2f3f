"""Training images kept as files of raw pixels, so that later epochs need not decode or resize them again.

Which images are kept depends only on their sizes and the limit, so workers, ranks and machines that share a folder
agree without communication. A file is replaced as a whole. It is used only if its image has not changed, the same
versions of the same libraries made it and its checksum is right; otherwise it is made again.
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from jaxtyping import UInt8

from megdet.data.coco import CocoDataset
from megdet.data.far.folder import ImageFile, stamp_of
from megdet.data.plan import evaluation_size
from megdet.files import delete_leftovers, reason_of, replace_file
from megdet.recipe import Data

_MAGIC = b"MegDet01"
_HEADER = struct.Struct("<8s16sqqIII4x")
"""magic, libraries, time of change in ns and bytes of the image file, height, width, checksum: 56 bytes"""

_Pixels = UInt8[np.ndarray, "height width 3"]


def image_cache(data: Data, dataset: CocoDataset) -> "ImageCache | None":
    """The cache that a recipe asks for, or None."""
    if data.cache == "none":
        return None
    sizes = dataset.sizes
    if data.cache == "resized":
        sizes = np.array([evaluation_size(height, width, data) for height, width in sizes.tolist()])
    filled = np.cumsum(_HEADER.size + 3 * sizes.prod(axis=1))
    num_kept = int(np.searchsorted(filled, data.cache_gib * 2**30, side="right"))
    delete_leftovers(Path(data.cache_folder))
    return ImageCache(Path(data.cache_folder), num_kept, is_resized=data.cache == "resized")


class ImageCache:
    """Pixels of the first `num_kept` images of a data set, made where they are missing."""

    def __init__(self, folder: Path, num_kept: int, *, is_resized: bool) -> None:
        self.folder, self.num_kept, self.is_resized = folder, num_kept, is_resized
        versions = [PIL.__version__, simplejpeg.__version__]
        if is_resized:
            # the bits of a resized image may depend on the processor's vector units
            versions += [torch.__version__, torchvision.__version__, torch.backends.cpu.get_cpu_capability()]
        self._libraries = hashlib.sha256(" ".join(versions).encode()).digest()[:16]
        self._is_written = True
        self._notices: list[str] = []

    def pixels(self, index: int, path: ImageFile, kind: str, make: Callable[[], _Pixels]) -> _Pixels:
        """The pixels that `make` gives for image `index`, from the cache file if there is one; may be written to.

        `kind` names the form of the pixels (`decoded`, `resized to ...`): an image may be cached in several forms.
        """
        if index >= self.num_kept:
            return make()
        try:
            changed = stamp_of(path)
        except OSError:
            return make()  # its error says what is wrong
        name = path.absolute() if isinstance(path, Path) else path
        key = hashlib.sha256(os.fsencode(f"{kind}\n{name}")).hexdigest()[:32]
        file = self.folder / key[:2] / f"{key}.pixels"
        stamp = self._libraries, *changed
        pixels = self._read(file, path, stamp)
        if pixels is None:
            pixels = make()
            self._write(file, stamp, pixels)
        return pixels

    def take_notices(self) -> list[str]:
        """Messages for the user since the last call, a line each."""
        taken, self._notices = self._notices, []
        return taken

    def _read(self, file: Path, path: ImageFile, stamp: tuple[bytes, int, int]) -> _Pixels | None:
        try:
            content = np.fromfile(file, np.uint8)
        except OSError:
            return None
        if len(content) >= _HEADER.size:
            magic, *stamped, height, width, checksum = _HEADER.unpack(content[: _HEADER.size].tobytes())
            pixels = content[_HEADER.size :]
            if magic == _MAGIC and tuple(stamped) != stamp:
                return None
            if magic == _MAGIC and len(pixels) == 3 * height * width and _checksum(pixels) == checksum:
                return pixels.reshape(height, width, 3)
        self._notices.append(f"{file}: this cached copy of {path} is damaged and is made again; is the disk sound?")
        return None

    def _write(self, file: Path, stamp: tuple[bytes, int, int], pixels: _Pixels) -> None:
        if not self._is_written:
            return
        flat = np.ascontiguousarray(pixels).reshape(-1)
        header = _HEADER.pack(_MAGIC, *stamp, *pixels.shape[:2], _checksum(flat))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, header + flat.tobytes(), durable=False, temporary_in=self.folder)
        except OSError as error:
            self._is_written = False
            self._notices.append(
                f"{self.folder}: no more images can be cached ({reason_of(error)}); the run goes on without them; "
                "free space or lower data.cache_gib"
            )


def _checksum(pixels: UInt8[np.ndarray, " bytes"]) -> int:
    """A CRC of the sums of 4 KiB pages, in a tenth of the time of a CRC of all bytes."""
    whole = len(pixels) // 8 * 8
    words = pixels[:whole].view(np.uint64)
    pages = np.add.reduceat(words, np.arange(0, len(words), 512)) if whole else words
    return zlib.crc32(pixels[whole:].tobytes(), zlib.crc32(pages.tobytes()))
