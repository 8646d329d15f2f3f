"""Image folders and their files, on this machine's disks or at an address that fsspec knows.

A local folder is a `Path`, and nothing of fsspec is imported for it. A `FarFolder` is a text and a few numbers: it is
sent to loading processes, each of which opens it for itself.
"""

from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple, TypeAlias

from megdet.addresses import address_fault, is_address, masked
from megdet.errors import InputError
from megdet.recipe import Data

_GIB = 1 << 30
_ARCHIVES = ("zip://", "tar://")


class Stamp(NamedTuple):
    """What tells whether a file has changed."""

    token: int
    """of its etag, checksum or time, whichever the server gives; of a local file its time of change in ns"""
    size: int
    """bytes; -1 if not known"""


UNKNOWN = Stamp(0, -1)
"""Of a file whose server lists none, such as a web server: nothing is known before it is fetched."""


@dataclass(frozen=True)
class FarFolder:
    """A folder at an address."""

    address: str
    """as `folder_of` writes it: an archive is chained, `zip://photos/::/data/photos.zip`"""
    copies: str = ""
    """local folder of the copies of its files"""
    most_bytes: int = 0
    """of all copies; 0 = none are kept"""
    timeout: float = Data.far_timeout
    """seconds a request may take"""
    retries: int = Data.far_retries
    """how often a request is made again"""

    def __str__(self) -> str:
        return masked(self.address)

    def __truediv__(self, file_name: str) -> "FarFile":
        return FarFile(self, file_name)

    def as_file(self) -> "FarFile":
        """The file at this address, if it is that of a file."""
        inside, colons, outside = self.address.partition("::")
        above, _, file_name = inside.rpartition("/")
        return FarFile(replace(self, address=f"{above}/{colons}{outside}"), file_name)


@dataclass(frozen=True)
class FarFile:
    """A file of such a folder."""

    folder: FarFolder
    file_name: str
    """relative to the folder, with `/`"""
    stamp: Stamp = UNKNOWN
    """what was known of it when the data set was read"""

    def __str__(self) -> str:
        inside, colons, outside = str(self.folder).partition("::")
        return f"{inside}{'' if inside.endswith('/') else '/'}{self.file_name}{colons}{outside}"


ImageFolder: TypeAlias = Path | FarFolder
ImageFile: TypeAlias = Path | FarFile


def folder_of(place: str | ImageFolder, data: Data | None = None) -> ImageFolder:
    """The folder at a path or an address; `data` says which copies of far files are kept, without it none.

    Raises InputError for an address that holds a secret.
    """
    address = place.address if isinstance(place, FarFolder) else str(place)
    if not is_address(address):
        return Path(place) if isinstance(place, str) else place
    if fault := address_fault(address):
        raise InputError(f"{masked(address)}: {fault}")
    if address.startswith("file://"):
        import urllib.parse  # here, because they load much, and paths do without them
        import urllib.request

        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(address).path))
    if address.startswith(_ARCHIVES) and "::" not in address:
        scheme, _, archive = address.partition("://")
        address = f"{scheme}://::{archive}"
    *outer, last = address.split("::")
    is_local = "://" not in last or last.startswith("file://")
    if "://" not in last:
        address = "::".join([*outer, str(Path(last).absolute())])
    if data is None or is_local:  # an archive on a disk needs no copies beside it
        return FarFolder(address) if data is None else FarFolder(address, timeout=data.far_timeout)
    copies = str(Path(data.cache_folder) / "files")
    return FarFolder(address, copies, int(data.far_cache_gib * _GIB), data.far_timeout, data.far_retries)


def file_in(folder: ImageFolder, file_name: str, stamp: Stamp = UNKNOWN) -> ImageFile:
    """A file of a folder."""
    return folder / file_name if isinstance(folder, Path) else FarFile(folder, file_name, stamp)


def stamp_of(file: ImageFile) -> Stamp:
    """The stamp of a file. Raises OSError if a local one is missing."""
    if isinstance(file, FarFile):
        return file.stamp
    status = file.stat()
    return Stamp(status.st_mtime_ns, status.st_size)


def name_of(file: ImageFile) -> PurePath:
    """The path of a file in its folder, or the whole path of a local one: for the name of what is made of it."""
    return file if isinstance(file, Path) else PurePosixPath(file.file_name)


def local_folder(folder: ImageFolder, what: str) -> Path:
    """The folder, if it is on this machine. Raises InputError for an address; `what` begins the sentence."""
    if isinstance(folder, Path):
        return folder
    raise InputError(f"{folder}: {what} needs a folder on this machine: fetch the images and give their folder")
