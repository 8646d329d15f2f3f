"""Which faults of a request may pass, so that it is made again, and what they are called."""

import tarfile
import zipfile
from typing import Any

from megdet.addresses import masked
from megdet.errors import InputError, printable

_MAY_PASS = (408, 425, 429)
"""Statuses below 500 with which a server asks to come again."""
_REFUSED = (401, 403, 407)


class CutShortError(Exception):
    """An answer that has not as many bytes as the file."""

    def __init__(self, got: int, size: int) -> None:
        super().__init__(f"{got} bytes came of a file of {size}: it was cut short, or the file is another one now")


def not_missing(error: FileNotFoundError) -> Exception | None:
    """The true fault of an error that only says that a file is missing; None if it is missing.

    fsspec reports every fault of a question about a web file so, a server that is overloaded too.
    """
    cause = error.__cause__
    return cause if isinstance(cause, Exception) and not isinstance(cause, KeyError | FileNotFoundError) else None


def lasting_fault(error: Exception) -> str:
    """Why a request need not be made again, and how to mend it; empty if the fault may pass."""
    if isinstance(error, FileNotFoundError):
        error = not_missing(error) or error
    status = _status(error)
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "no such file on the server (404): check the folder's address and the file_name"
    if isinstance(error, PermissionError) or status in _REFUSED or "Credentials" in type(error).__name__:
        said = f" ({status})" if status else f" ({_text(error)})"
        return f"the server refuses it{said}: give this machine the right to read it; some say so of missing files too"
    if 400 <= status < 500 and status not in _MAY_PASS:
        return f"the server answers {status}: {_text(error)}"
    if isinstance(error, zipfile.BadZipFile | tarfile.TarError):
        return f"the archive cannot be read ({_text(error)}): is it whole?"
    # a question that this file system cannot be asked, or not without a library: asked again it is the same
    if isinstance(error, ValueError | ImportError | NotImplementedError | IsADirectoryError):
        return _text(error)
    return ""


def passing_fault(error: Exception, timeout: float) -> str:
    """What a fault that may pass is called; `timeout` is the time limit of a request in seconds."""
    if isinstance(error, TimeoutError):
        return f"no whole answer within {timeout:g} s (data.far_timeout)"
    if status := _status(error):
        return f"the server answers {status}"
    if isinstance(error, CutShortError):
        return str(error)
    if type(error).__name__ in ("ClientPayloadError", "IncompleteRead", "IncompleteReadError"):
        return "an answer was cut short"
    return f"the connection failed ({_text(error)})"


def _status(error: Exception) -> int:
    """The status that a server answered; 0 if the error has none."""
    answer: Any = getattr(error, "response", None)  # of botocore
    if isinstance(answer, dict):
        found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    else:
        found = getattr(error, "status", None) or getattr(error, "code", None)
    return int(found) if isinstance(found, int) or (isinstance(found, str) and found.isdecimal()) else 0


def _text(error: Exception) -> str:
    """One line without secrets: libraries put the address into their messages."""
    return printable(masked(" ".join(str(error).split()))) or type(error).__name__
