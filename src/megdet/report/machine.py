"""Where and with what a run ran, as its environment.json says."""

import msgspec

from megdet.files import typed
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.sessions import read_environment


class _Device(msgspec.Struct):
    name: str = ""


class _Cpu(msgspec.Struct):
    model: str | None = None


class _Training(msgspec.Struct):
    positive_out_of: dict[str, float] = {}


class Session(msgspec.Struct):
    """The part of an entry of environment.json, one start of the run, that the report tells."""

    started_utc: str = ""
    world_size: int = 1
    device: str = ""
    devices: list[_Device] = []
    cpu: _Cpu = msgspec.field(default_factory=_Cpu)
    versions: dict[str, str | None] = {}
    training: _Training = msgspec.field(default_factory=_Training)


def sessions_of(folder: RunFolder) -> list[Session]:
    """The starts of a run, the oldest first. Raises InputError where the file holds something else."""
    if not folder.environment.is_file():
        return []
    return [typed(entry, Session, str(folder.environment)) for entry in read_environment(folder)]


def machine_facts(sessions: list[Session]) -> list[tuple[str, str]]:
    """Where and with what it ran last, and since when, as (what, value)."""
    if not sessions:
        return []
    first, last = sessions[0], sessions[-1]
    name = last.devices[0].name if last.devices else last.cpu.model
    starts = f", {len(sessions)} starts" if len(sessions) > 1 else ""
    return [
        ("machine", f"{last.world_size} x {name or last.device}"),
        ("started", f"{first.started_utc[:16].replace('T', ' ')} UTC{starts}"),
        (
            "versions",
            ", ".join(f"{what} {last.versions[what]}" for what in ("megdet", "torch") if last.versions.get(what)),
        ),
    ]
