"""Reading JSON and writing files whole, with errors a user can act on."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from megdet.errors import InputError


def read_json(path: Path) -> Any:
    """The value of a JSON file in UTF-8.

    Raises:
        InputError: the file is missing, unreadable or not JSON; the message has the line and the column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; it should be a COCO instances file (.json)") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path}: not valid JSON at {where}: {error.msg}; was it copied whole?") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a JSON file in UTF-8 (byte {error.start})") from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{path}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: the JSON is nested too deeply for a COCO instances file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one; raises OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
