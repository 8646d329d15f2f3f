"""What fsspec needs to open an address, and what it lacks on this machine."""

import os
import re
import urllib.parse
from typing import Any

from fsspec.registry import get_filesystem_class

from megdet.errors import InputError, nearest

_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of our package that brings the library of a protocol."""
_WRAPPERS = ("simplecache", "filecache", "blockcache", "dir")
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://|$)")
WEB = ("http", "https")


def protocols_of(address: str) -> list[str]:
    """The protocols of an address, the outermost first. Raises InputError for one that cannot be used here."""
    found = [match[0] for part in address.split("::") if (match := _PROTOCOL.match(part))]
    for name in found:
        _refuse_missing(name)
    return found


def is_listed(address: str) -> bool:
    """Whether the server of a folder lists its files with their sizes; web servers do not."""
    inner = (match[0] for part in address.split("::") if (match := _PROTOCOL.match(part)))
    return next((name for name in inner if name not in _WRAPPERS), "") not in WEB


def options_of(protocol: str, timeout: float) -> dict[str, Any]:
    """The options with which a file system is opened; `timeout` is the time limit of a request in seconds."""
    # an instance that fsspec shares would be closed in a forked process, and with it the connections of its parent
    options: dict[str, Any] = {"skip_instance_cache": True}
    if protocol in WEB:
        from aiohttp import ClientTimeout  # here, because other protocols do without it

        # trust_env: passwords of ~/.netrc, and proxies of the environment
        options["client_kwargs"] = {"timeout": ClientTimeout(total=timeout), "trust_env": True}
    elif protocol in ("s3", "s3a"):
        options["config_kwargs"] = {"connect_timeout": timeout, "read_timeout": timeout}
    return options


def in_folder(root: str, file_name: str) -> str:
    """The path of a file in a folder as fsspec names both; in a web address the name is quoted."""
    if root.startswith(("http://", "https://")):
        file_name = urllib.parse.quote(os.fsencode(file_name))
    return f"{root.rstrip('/')}/{file_name}" if root.strip("/") else f"{root}{file_name}"


def _refuse_missing(protocol: str) -> None:
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        mend = f"pip install 'megdet[{extra}]'" if extra else str(error)
        raise InputError(f"{protocol}:// needs a library that is not installed: {mend}") from None
    except ValueError:
        from fsspec.registry import known_implementations

        hint = nearest(protocol, known_implementations)
        raise InputError(f"fsspec knows no protocol {protocol}://{hint}") from None
