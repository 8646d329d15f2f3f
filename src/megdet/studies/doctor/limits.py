"""The system's limits for a training: cores, open files, shared memory, disk; without torch."""

import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from megdet.errors import InputError
from megdet.files import reason_of, temporary_name
from megdet.studies.doctor.finding import Finding, State

MIB, GIB = 2**20, 2**30
_LEAST_FILES = 1024
_FEW_FILES = 4096
_LEAST_SHARED, _GOOD_SHARED = 64 * MIB + 1, 2 * GIB
"""Bytes of shared memory: Docker gives a container the first; below the second, batches may not fit."""
_LEAST_FREE, _GOOD_FREE = 1 * GIB, 10 * GIB
_WRITTEN = 64 * MIB
_SLOW_DISK = 50 * MIB
"""Bytes a second; a checkpoint of ResNet-50 FPN has some 330 MB."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def look_at_cores(cores_there: int, cores_usable: int, quota: float | None, ranks: int) -> Finding:
    """The processor's cores, those this process may use, the quota of its container and the ranks that share them."""
    have = cores_usable if quota is None else min(cores_usable, quota)
    numbers = {"there": cores_there, "usable": cores_usable, "quota": quota}
    limit = "" if quota is None else f", a quota of {quota:g}"
    text = f"{cores_usable} of {cores_there} usable{limit}"
    if have < 1 or have < ranks:
        return Finding("cores", "look", text, f"give it a core for each of the {ranks} ranks, better two", numbers)
    if quota is not None and quota < cores_usable:
        step = f"threads are started for {cores_usable} cores: set OMP_NUM_THREADS={max(1, int(quota) // ranks)}"
        return Finding("cores", "look", text, step, numbers)
    if have < 2:
        return Finding("cores", "look", text, "loading competes with the training: --workers 0, or more cores", numbers)
    return Finding("cores", "good", text, numbers=numbers)


def core_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the container of this process may use on average; None without a limit."""
    try:
        second = root / "cpu.max"
        if second.exists():
            quota, period = second.read_text().split()[:2]
        else:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None  # no such control group here
    return None if quota in ("max", "-1") else int(quota) / int(period)


def look_at_threads(cores: int) -> Finding:
    """The variables that set the threads of a process."""
    given = {name: os.environ[name] for name in _THREADS if name in os.environ}
    text = ", ".join(f"{name}={value}" for name, value in given.items()) or "not set: as many threads as cores"
    wrong = [name for name, value in given.items() if not value.isdecimal() or not 1 <= int(value) <= cores]
    if wrong:
        return Finding("threads", "look", text, f"unset {wrong[0]}, or set it to 1 to {cores}", dict(given))
    if "1" in given.values() and cores > 1:
        step = f"a run of one process computes on 1 of {cores} cores: unset {next(iter(given))}"
        return Finding("threads", "look", text, step, dict(given))
    return Finding("threads", "good", text, numbers=dict(given))


def look_at_open_files() -> Finding:
    """How many files this process may open: each batch on its way from a loading process holds some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{'no limit' if soft == resource.RLIM_INFINITY else soft}"
    if soft == resource.RLIM_INFINITY or soft >= _FEW_FILES:
        return Finding("open files", "good", text, numbers={"soft": soft, "hard": hard})
    state: State = "look" if soft >= _LEAST_FILES else "bad"
    allowed = "65536" if hard == resource.RLIM_INFINITY else str(hard)
    step = f"ulimit -n {allowed} before the training, if many loading processes run"
    return Finding("open files", state, text, step, {"soft": soft, "hard": hard})


def look_at_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """The shared memory through which loading processes pass their batches."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return Finding("shared memory", "good", f"no {folder} on this system, which shares memory in another way")
    numbers = {"size_bytes": usage.total, "free_bytes": usage.free}
    text = f"{usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} free"
    if usage.free >= _GOOD_SHARED:
        return Finding("shared memory", "good", text, numbers=numbers)
    step = "large batches go through slower pipes: docker run --shm-size=8g, or fewer --workers"
    return Finding("shared memory", "look", text, step, numbers)


def look_at_disk(folder: Path) -> Iterator[Finding]:
    """Free space, and the speed of writing with a flush, on the disk of a run folder, which need not exist."""
    place = _existing(folder)
    usage = shutil.disk_usage(place)
    numbers = {"folder": str(place), "free_bytes": usage.free, "size_bytes": usage.total}
    text = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} at {place}"
    if usage.free < _GOOD_FREE:
        is_bad = usage.free < _LEAST_FREE
        yield Finding(
            "disk", "bad" if is_bad else "look", text, "make room, or choose another disk with --run", numbers
        )
    else:
        yield Finding("disk", "good", text, numbers=numbers)
    if usage.free < 2 * _WRITTEN:
        return
    try:
        speed = _writing_speed(place)
    except OSError as error:
        step = "let this user write there, or choose another folder with --run"
        yield Finding("disk speed", "bad", f"{place} cannot be written: {reason_of(error)}", step)
        return
    text = f"{speed / MIB:.0f} MiB/s written and flushed"
    step = "checkpoints are written beside the training, but rarely is better here: checkpoint_minutes 60"
    is_slow = speed < _SLOW_DISK
    found = {"bytes_a_second": speed}
    yield Finding("disk speed", "look" if is_slow else "good", text, step if is_slow else "", found)


def _writing_speed(folder: Path) -> float:
    """Bytes a second, measured with a file that is deleted again."""
    file, block = folder / temporary_name("speed"), os.urandom(MIB)
    try:
        started = time.perf_counter()
        with file.open("wb", buffering=0) as opened:
            for _ in range(_WRITTEN // MIB):
                opened.write(block)
            os.fsync(opened.fileno())
        return _WRITTEN / (time.perf_counter() - started)
    finally:
        file.unlink(missing_ok=True)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest existing one above it. Raises InputError for a file."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{place} is a file, not a folder; name the folder of a run")
    return place
