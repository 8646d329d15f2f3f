"""Reads and writes whole files: errors are InputErrors, and no reader ever sees half a file.

Files that are read are not trusted: size and nesting have limits, and JSON is checked against the types that the caller
names.
"""

import codecs
import io
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, overload

import msgspec

from megdet.errors import InputError, printable, shown

LARGEST_TEXT = 64 << 20
"""Largest text file in bytes, annotation files excepted."""
LARGEST_JSON = 16 << 30
"""Largest JSON file in bytes; the largest public annotation files have two GiB."""
_DEEPEST = 64  # lists in lists; ours have 6
_LONGEST_NAME, _LONGEST_HOST = 160, 60  # bytes of a file's name and of a host's in a temporary name; systems allow 255
_WRITE_AGAIN = "the file may be cut short, write or download it again"

_LEFTOVER_SECONDS = 60.0

_Kind = TypeVar("_Kind")


def replace_file(path: Path, content: bytes, *, durable: bool = True, temporary_in: Path | None = None) -> None:
    """Replace a file as a whole: a reader sees the old one or the new one.

    A symbolic link of this name is replaced too: nothing is written to where it points. `durable` flushes the file to
    the disk as well, so that it survives a loss of power. It is written in `temporary_in`, a folder of the same disk,
    by default the file's own. Raises OSError.
    """
    temporary = (temporary_in or path.parent) / temporary_name(path.name)
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process, or a link put there by another user
        # Not tempfile.mkstemp: its files are for the owner only, and os.replace would keep that.
        with temporary.open("xb") as file:
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
    short = os.fsdecode(os.fsencode(name)[:_LONGEST_NAME])
    return f".{short}.{platform.node()[:_LONGEST_HOST]}.{os.getpid()}.tmp"


def delete_leftovers(folder: Path, *, inside: bool = False) -> None:
    """Delete temporary files and folders that killed processes of this machine left in a folder.

    With `inside`, those in its folders too. What is of the last minute stays: it may belong to a container of the same
    name, whose processes are not visible.
    """
    if os.name != "posix":
        return  # elsewhere os.kill with signal 0 kills the process
    for path in folder.rglob(".*.tmp") if inside else folder.glob(".*.tmp"):
        whose, _, number = path.name.removesuffix(".tmp").rpartition(".")
        if not whose.endswith(f".{platform.node()[:_LONGEST_HOST]}") or not number.isdecimal():
            continue
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            with suppress(OSError):  # another process deleted it, or it is another user's
                if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        except (OSError, OverflowError):
            continue  # alive but of another user, or not a valid process id


def write_text_atomically(path: Path, text: str) -> None:
    """Replace the file by this text (UTF-8): after a crash or a loss of power it is the old one or the new one.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise cannot_write(path, error) from error


def write_json_atomically(path: Path, value: object, indent: int | None = None) -> None:
    """Replace the file by this value as JSON, atomically.

    Args:
        path: the file.
        value: dicts, lists, strings, Python numbers, None; a number that is not finite raises ValueError. A byte
            of a file name that is not UTF-8 is written as the text `\\udcff`: strict readers refuse Python's form.
        indent: spaces a level, for human readers; None, the default, is one long line, several times faster.

    Raises:
        InputError: the file cannot be written.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = re.sub("[\ud800-\udfff]", lambda found: "\\" + printable(found[0]), text)
    write_text_atomically(path, text + "\n")


@overload
def read_json(path: Path) -> Any: ...


@overload
def read_json(path: Path, kind: type[_Kind]) -> _Kind: ...


def read_json(path: Path, kind: Any = Any) -> Any:
    """The value in a JSON file (UTF-8, with or without a byte order mark).

    Args:
        path: the file.
        kind: the type to read it as, strictly: dataclasses or `msgspec.Struct`s, lists, dicts, unions of them. Keys
            that the type does not have are ignored.

    Raises:
        InputError: the file is missing or unreadable; it is not JSON (the message has line and column) or is nested too
            deeply; or it is not of this kind (the message has the place and the value).
    """
    return parse_json(read_bytes(path, LARGEST_JSON), str(path), kind)


def parse_json(content: bytes, source: str, kind: Any = Any) -> Any:
    """The value of a JSON text as `read_json` returns it; `source` names it in messages. Raises InputError."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        value = msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(error, source, _raw(content)) from None
    except msgspec.DecodeError as error:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{source} is not UTF-8 text but UTF-16; save it as UTF-8") from None
        raise InputError(f"{source} is not valid JSON: {_place_in_text(str(error), content)}; {_WRITE_AGAIN}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text: {error.reason}; save it as UTF-8") from None
    except RecursionError:
        raise InputError(f"{source} is not usable JSON: it is nested too deeply; write it again") from None
    if kind is Any and _is_deep(value):
        raise InputError(f"{source} is not usable JSON: it is nested too deeply; write it again")
    return value


def _raw(content: bytes) -> Any:
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # it is broken behind that place
        return None


@overload
def typed(value: object, kind: type[_Kind], source: str) -> _Kind: ...


@overload
def typed(value: object, kind: Any, source: str) -> Any: ...


def typed(value: object, kind: Any, source: str) -> Any:
    """A value converted to a type, strictly. Raises InputError with `source` and the place and content of the fault."""
    try:
        return msgspec.convert(value, kind)
    except UnicodeEncodeError as error:
        raise InputError(f"{source}: {shown(error.object)} is not Unicode text; write it again") from error
    except msgspec.ValidationError as error:
        raise _refusal(error, source, value) from None


def _refusal(error: msgspec.ValidationError, source: str, value: Any) -> InputError:
    """`FILE: detections[3].bbox[2]: expected float >= 0.0, here stands -1`, from msgspec's error and the value."""
    fault, _, path = str(error).replace("`", "").partition(" - at $")
    for name, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
        try:
            value = value[name] if name else value[int(index)]
        except (KeyError, IndexError, TypeError):  # a key has a dot in it: leave the value out of the message
            value = None
    where = f"{source}: {path.lstrip('.')}" if path else source
    here = "" if value is None else f", here stands {shown(value)}"
    return InputError(f"{where}: {fault[:1].lower()}{fault[1:]}{here}")


def _place_in_text(fault: str, content: bytes) -> str:
    if not content.strip():
        return "line 1, column 1: the file is empty"
    found = re.search(r"(?:JSON is malformed: )?(.*) \(byte (\d+)\)", fault)
    place = int(found[2]) if found else len(content)
    line = content.count(b"\n", 0, place) + 1
    column = len(content[content.rfind(b"\n", 0, place) + 1 : place].decode(errors="replace")) + 1
    what = found[1] if found else "it ends too early"
    if re.match(rb"-?(NaN|Infinity)", content[place : place + 9]):
        what = "NaN and Infinity, which some tools write, are not JSON: write a number there"
    return f"line {line}, column {column}: {what}"


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [child for parent in level for child in _children(parent) if type(child) in (list, dict)]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    return value.values() if type(value) is dict else value if type(value) is list else ()


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that a rename in it survives a loss of power (POSIX)."""
    if os.name != "posix":
        return  # on other systems a folder cannot be opened; the rename is still atomic
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Make a folder, and those above it, if it is missing; returns it. Raises InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def write_result(path: Path, value: Any) -> None:
    """Write detections or numbers as JSON, making the folder. Raises InputError."""
    make_folder(path.parent)
    write_json_atomically(path, value, indent=2 if isinstance(value, dict) else None)


def write_picture(path: Path, save: Callable[[io.BytesIO], object]) -> None:
    """Write what `save` puts into a file, and make its folder. Raises InputError if it cannot be written."""
    content = io.BytesIO()
    save(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.getvalue(), durable=False)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> InputError:
    """The InputError for a file or folder that could not be written."""
    return InputError(
        f"{path} cannot be written: {reason_of(error)}; check its folder, its permissions and the free space"
    )


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises InputError."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from error


def read_bytes(path: Path, limit: int = LARGEST_TEXT) -> bytes:
    """The content of a plain file of at most `limit` bytes. Raises InputError."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path} cannot be read: it is a folder, a file is wanted here; check the path")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
            raise InputError(f"{path} cannot be read: it is not a plain file; check the path")
        if status.st_size > limit:
            raise InputError(f"{path} has {status.st_size} bytes, more than {limit}; is it the right file?")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; check the path") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise InputError(f"{path} cannot be read: {reason_of(error)}; check the path and its permissions") from error


def is_file(path: Path) -> bool:
    """Whether a file exists; False for a name that no file can have, of 256 bytes or with a zero byte."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def reason_of(error: Exception) -> str:
    """The system's description of an error, without the path that the message already has."""
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
