"""Memory: what is free, what was taken, and whether freed memory stays in the process or returns to the system."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_NO_MEMORY = (
    *("can't allocate memory", "bad_alloc", "not enough memory", "Cannot allocate memory"),
    *("could not create a primitive", "could not execute a primitive", "can't start new thread"),
)
"""Words in the errors of torch, of oneDNN (a primitive) and of Python (a thread) when memory has run out."""
_CONTAINERS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Files with the limit and the use of a container's memory, for both versions of control groups."""


def memory_bytes() -> int | None:
    """Memory of the machine; None if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # a system without these names


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out: on a CPU torch raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def free_bytes(device: torch.device, ranks: int) -> int | None:
    """Memory that this process may still take on a device; None if the system does not tell.

    On a CPU it is what the machine and its container have left, divided by the number of `ranks` on the machine, within
    the limits of the process (`ulimit -v`, `ulimit -d`).
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        import resource

        system, own = _numbers(Path("/proc/meminfo")), _numbers(Path("/proc/self/status"))
        left = [system["MemAvailable"] // ranks]
        for limit, used in ((resource.RLIMIT_AS, own["VmSize"]), (resource.RLIMIT_DATA, own["VmData"])):
            if (most := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
                left.append(most - used)
    except (ImportError, OSError, KeyError):
        return None
    for file, taken in _CONTAINERS:
        if file.exists() and (text := file.read_text().strip()).isdecimal():
            left.append((int(text) - int(taken.read_text())) // ranks)
    return max(0, min(left))


def give_memory_back(device: torch.device) -> None:
    """Return freed memory to the system, after memory has run out.

    Otherwise freed memory of a CPU stays in the process (`keep_freed_memory`), where oneDNN cannot use it for its code.
    From now on large blocks are returned as soon as they are freed, which is slower.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # of malloc.h
        for setting, value in ((mmap_max, 1 << 16), (mmap_threshold, 1 << 20), (trim_threshold, 1 << 20)):
            libc.mallopt(setting, value)
        return_freed_memory()


def return_freed_memory() -> None:
    """Return what is free now to the system, also what the allocator keeps for threads that have ended."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_bytes(device: torch.device) -> int | None:
    """The peak memory of this process on a device so far; None if the system does not tell.

    The allocator or the system knows it, so the device is not waited for.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        return _numbers(Path("/proc/self/status"))["VmHWM"]
    except (OSError, KeyError):
        return None


@contextmanager
def within_bytes(count: int | None, device: torch.device) -> Iterator[None]:
    """On a CPU, limit what this process may still take to `count` bytes: Linux kills a process that takes too much."""
    if device.type != "cpu" or count is None:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    most = _numbers(Path("/proc/self/status"))["VmData"] + count
    if before[0] != resource.RLIM_INFINITY:
        most = min(most, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _numbers(file: Path) -> dict[str, int]:
    """The sizes in a file under /proc, in bytes."""
    rows = (line.split() for line in file.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) << 10 for row in rows if row[2:] == ["kB"]}


def keep_freed_memory() -> None:
    """Make the allocator keep the memory that a step frees for the next step.

    glibc returns large blocks to the system, which fills every page with zeros when the next step asks for them: up to
    a third of a step on a CPU.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return  # another libc works differently
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, (1 << 31) - 1)
