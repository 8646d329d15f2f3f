"""The entries of environment.json, one a start of the run; read and written without loading torch."""

from typing import Any

import msgspec

from megdet.errors import InputError
from megdet.files import read_json, write_json_atomically
from megdet.run_folder.folder import RunFolder


class _Content(msgspec.Struct):
    sessions: list[dict[str, Any]]


def write_environment(folder: RunFolder, session: dict[str, Any]) -> None:
    """Append a session to environment.json.

    Raises:
        InputError: the file that is there holds something else, or it cannot be written.
    """
    sessions = read_environment(folder) if folder.environment.exists() else []
    write_json_atomically(folder.environment, {"sessions": [*sessions, session]}, indent=2)


def read_environment(folder: RunFolder) -> list[dict[str, Any]]:
    """The sessions of a run, the oldest first. Raises InputError if the file is missing or holds something else."""
    try:
        return read_json(folder.environment, _Content).sessions
    except InputError as error:
        raise InputError(f"{error}; remove the file, the next start writes it again") from None
