"""The processes of a running command and their roles, read from /proc (Linux only)."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["launcher", "rank", "worker", "helper"]
"""torchrun; a rank; a loading process; a helper beside the training"""
MARK = "MEGDET_CHAOS"
"""The environment variable by which a command and the processes it starts are recognised."""
_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process of the command that is alive."""

    pid: int
    parent: int
    words: tuple[str, ...]
    """its command line"""

    def send(self, number: int) -> bool:
        """Send the process a signal; False if it has ended meanwhile."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


@dataclass(frozen=True)
class Target(Process):
    """A process that may be disturbed."""

    role: Role


def processes_of(mark: str) -> list[Process]:
    """All living processes with the mark in their environment, whatever their parent is now."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in _PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            state, parent = (folder / "stat").read_text().rpartition(") ")[2].split()[:2]
            words = tuple((folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0"))
        except (OSError, ValueError):  # it has just ended, or belongs to another user
            continue
        if state not in "ZX":
            found.append(Process(int(folder.name), int(parent), words))
    return sorted(found, key=lambda process: process.pid)


def targets_of(mark: str, root: int) -> list[Target]:
    """The processes of a mark that have a role; `root` is the process of the command itself."""
    processes = processes_of(mark)
    role_of: dict[int, Role] = {}
    # a parent may have a larger id than its child, since ids start again from low numbers
    for _ in range(4):
        for process in processes:
            role = _role(process, root, role_of.get(process.parent))
            if role is not None:
                role_of[process.pid] = role
    return [Target(own.pid, own.parent, own.words, role_of[own.pid]) for own in processes if own.pid in role_of]


def _role(process: Process, root: int, parent: Role | None) -> Role | None:
    words = process.words
    if process.pid == root:
        return "launcher" if "torch.distributed.run" in words else "rank"
    if "megdet.distributed.helper" in words:
        return "helper"
    if "-c" in words:  # a resource tracker or a fork server
        return None
    if parent == "launcher":
        return "rank"
    return "worker" if parent in ("rank", "helper") else None


def end_all(mark: str) -> None:
    """Kill all processes of a command."""
    while processes := processes_of(mark):
        for process in processes:
            process.send(signal.SIGKILL)
