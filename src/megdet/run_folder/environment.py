"""environment.json: the machine and the software that a run was computed with.

    {"sessions": [session, ...]}      one session a start of the run, the oldest first; a resume appends one

docs/run_folder.md lists the keys of a session. Only the machine of rank 0, which writes the file, is described.
"""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megdet.memory import memory_bytes
from megdet.runtime import accelerators, num_gpus, processor_name, usable_cores


def collect_environment(world_size: int, device: str) -> dict[str, Any]:
    """The entry of one session.

    Args:
        world_size: number of ranks of the run.
        device: torch's name of the device that the run computes on ("cpu", "cuda", "cuda:1", "mps").
    """
    return {
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "folder": str(Path.cwd()),
        "world_size": world_size,
        "device": device,
        "devices": accelerators(device),
        "cpu": {"model": processor_name(), "cores": usable_cores(), "memory_bytes": memory_bytes()},
        "host": platform.node(),
        "system": platform.platform(),
        "versions": _versions(),
        "git": git_state(Path.cwd()),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit, and whether a tracked file is changed; None outside a repository, or if git does not answer."""
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or status is None else {"commit": commit, "dirty": bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git on this machine, or a repository on a disk that does not answer
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str | None]:
    packages = {name: _version(name) for name in ("megdet", "torchvision", "timm", "numpy")}
    nccl = None
    if num_gpus() and torch.distributed.is_nccl_available():
        nccl = ".".join(str(number) for number in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **packages,
        "cuda": torch.version.cuda,
        "nccl": nccl,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
