"""Files read and written whole: an error is one that a user can act on, and nobody ever sees half a file."""

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megdet.errors import InputError

_LEFTOVER_SECONDS = 60.0


def replace_file(path: Path, content: bytes, *, durable: bool = True, temporary_in: Path | None = None) -> None:
    """Replace a file as a whole: a reader sees the old one or the new one.

    `durable` flushes it to the disk as well, so that it survives a loss of power. It is written in `temporary_in`, a
    folder of the same disk, by default the file's own. Raises OSError.
    """
    # Not tempfile.mkstemp: its files are for the owner only, and os.replace would keep that.
    temporary = (temporary_in or path.parent) / temporary_name(path.name)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 (tests make this very call fail)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_name(name: str) -> str:
    """The name of a hidden file that says which process of which machine has it, for `delete_leftovers`."""
    return f".{name}.{platform.node()}.{os.getpid()}.tmp"


def delete_leftovers(folder: Path, *, inside: bool = False) -> None:
    """Delete what killed processes of this machine left of `replace_file` in a folder, and `inside` its folders too.

    What was touched in the last minute stays: a container of the same name may have it, whose processes are not seen.
    """
    if os.name != "posix":
        return  # elsewhere to ask for a process is to kill it
    for path in folder.rglob(".*.tmp") if inside else folder.glob(".*.tmp"):
        whose, _, number = path.name.removesuffix(".tmp").rpartition(".")
        if not whose.endswith(f".{platform.node()}") or not number.isdecimal():
            continue
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            with suppress(OSError):  # another process deleted it, or it is another user's
                if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()
        except (OSError, OverflowError):
            continue  # it lives, and is another user's; or no process has such a number


def write_text_atomically(path: Path, text: str) -> None:
    """Replace the file by this text (UTF-8) as a whole: it survives a crash and a loss of power old or new, never half.

    A lone surrogate (a file name that is not Unicode) becomes its backslash escape, which JSON reads back as it was.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        replace_file(path, text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise cannot_write(path, error) from error


def write_json_atomically(path: Path, value: object, indent: int | None = None) -> None:
    """Replace the file by this value as JSON, atomically.

    Args:
        path: the file.
        value: dicts, lists, strings, Python numbers, None; a number that is not finite raises ValueError.
        indent: spaces a level for the eye; None, the default, is one long line, several times faster.

    Raises:
        InputError: the file cannot be written.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_text_atomically(path, text + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file (UTF-8, with or without a byte order mark).

    Raises:
        InputError: the file is missing or unreadable, or it is no JSON; then the message has the line and the column.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = "the file is empty" if not text.strip() else error.msg
        raise InputError(
            f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {found}; "
            "the file may be cut short, write or download it again"
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path} is not usable JSON: it is nested too deeply; write it again") from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, so that a rename in it survives a loss of power (POSIX)."""
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened; the rename is atomic all the same
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: Exception) -> InputError:
    """The InputError for a file or folder that could not be written."""
    return InputError(
        f"{path} cannot be written: {reason_of(error)}; check its folder, its permissions and the free space"
    )


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises InputError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}; check the path and its permissions") from error


def reason_of(error: Exception) -> str:
    """The system's words for what went wrong, without the path that the message already has."""
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
