"""The machine: its devices, processor, memory and speed, and the settings that a process makes once.

All questions to the machine are asked here, so that a test or a bench can pretend another one.
"""

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megdet.errors import InputError

Kind = Literal["cpu", "cuda"]
_SECONDS = 0.25
"""How long measuring takes; each operation runs at least once."""
_SLOW = 0.75
"""bfloat16 is slow below this part of float32's speed: so low that two measurements of a machine agree."""
_FORMATS = (torch.float32, torch.bfloat16)
_NO_MEMORY = (
    *("can't allocate memory", "bad_alloc", "not enough memory", "Cannot allocate memory"),
    *("could not create a primitive", "could not execute a primitive"),
)
"""What torch and, in the last two, oneDNN say when memory has run out."""
_CONTAINERS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""What a container may take and has taken, under both versions of control groups."""
_CHANNELS, _EDGE, _SIDE = 128, 36, 512


def num_gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def num_ranks_here() -> int:
    """Processes of the run on this machine, as torchrun tells them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable_cores() -> int:
    """Processor cores that this process may use, which a container may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Loading processes of this rank unless the user says another number: its share of the cores minus one, 1 to 8."""
    return max(1, min(8, usable_cores() // num_ranks_here() - 1))


def memory_bytes() -> int | None:
    """Memory of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # a system without these names


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out: on a CPU torch raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process may still take on a device; None where the system does not say.

    On a CPU it is this rank's share of what the machine and its container have left, within the limits of the process
    (`ulimit -v`, `ulimit -d`).
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        import resource

        system, own = _numbers(Path("/proc/meminfo")), _numbers(Path("/proc/self/status"))
        left = [system["MemAvailable"] // num_ranks_here()]
        for limit, used in ((resource.RLIMIT_AS, own["VmSize"]), (resource.RLIMIT_DATA, own["VmData"])):
            if (most := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
                left.append(most - used)
    except (ImportError, OSError, KeyError):
        return None
    for file, taken in _CONTAINERS:
        if file.exists() and (text := file.read_text().strip()).isdecimal():
            left.append((int(text) - int(taken.read_text())) // num_ranks_here())
    return max(0, min(left))


def give_memory_back(device: torch.device) -> None:
    """Return to the system what this process keeps for later, where memory has run out.

    Freed memory of a CPU stays in the process otherwise (`prepare_process`), where oneDNN cannot use it for its code.
    From now on large blocks are returned when they are freed, which is slower.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # of malloc.h
        for setting, value in ((mmap_max, 1 << 16), (mmap_threshold, 1 << 20), (trim_threshold, 1 << 20)):
            libc.mallopt(setting, value)
        libc.malloc_trim(0)


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that this process has had on a device so far; None where the system does not say.

    Asked of the allocator or of the system, not of the device, so nothing is waited for.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        return _numbers(Path("/proc/self/status"))["VmHWM"]
    except (OSError, KeyError):
        return None


@contextmanager
def within_bytes(count: int | None, device: torch.device) -> Iterator[None]:
    """On a CPU, let this process take so much more memory and not more: Linux kills what takes more than there is."""
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
    """The sizes in a file of Linux's, in bytes."""
    rows = (line.split() for line in file.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) << 10 for row in rows if row[2:] == ["kB"]}


def processor_name() -> str:
    """The model of the processor, or its architecture where the system does not say."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def is_intel_processor() -> bool:
    """Whether the system says that the processor is Intel's, on which MKL computes at its full speed."""
    return _cpuinfo("vendor_id") == "GenuineIntel" or "GenuineIntel" in platform.processor()


def _cpuinfo(key: str) -> str:
    """What Linux says of its first processor; empty where there is no such line."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return ""


def accelerators(device: str) -> list[dict[str, Any]]:
    """`name` and `memory_bytes` of all accelerators of a device's kind ("cuda", "cuda:1", "mps"); none for a CPU."""
    kind = torch.device(device).type
    if kind == "cuda" and num_gpus():
        properties = [torch.cuda.get_device_properties(index) for index in range(num_gpus())]
        return [{"name": found.name, "memory_bytes": found.total_memory} for found in properties]
    return [] if kind == "cpu" else [{"name": kind, "memory_bytes": None}]


def device_kind(asked: str) -> Kind:
    """What --device asks for: cpu, cuda, or empty for the GPU where there is one. Raises InputError."""
    if not asked:
        return "cuda" if num_gpus() else "cpu"
    if asked == "cpu":
        return "cpu"
    if asked != "cuda":
        raise InputError(f"--device {asked}: choose cpu or cuda")
    if not num_gpus():
        raise InputError("--device cuda: no CUDA device is visible here; use --device cpu")
    return "cuda"


def device_of_rank(asked: str, local_rank: int) -> torch.device:
    """The device of one of this machine's ranks: the CPU, or a GPU of its own. Raises InputError if there is none."""
    if device_kind(asked) == "cpu":
        return torch.device("cpu")
    if local_rank >= num_gpus():
        raise InputError(
            f"local rank {local_rank} has no GPU: this machine shows {num_gpus()}; "
            "start fewer processes with --nproc-per-node"
        )
    return torch.device("cuda", local_rank)


def device_beside(asked: str, training_device: torch.device) -> torch.device:
    """The device for work beside a training, seen from a rank that trains on `training_device`.

    `asked` is the value of --evaluate-on: cpu, cuda (the GPU of this rank, which is then shared), cuda:N, or empty.
    Empty means the first visible GPU that no rank trains on if the training is on GPUs, otherwise the CPU, so that the
    training loses no memory. Raises InputError for a device that does not exist.
    """
    if not asked:
        is_free = training_device.type == "cuda" and num_gpus() > num_ranks_here()
        return torch.device("cuda", num_ranks_here()) if is_free else torch.device("cpu")
    if asked == "cpu":
        return torch.device("cpu")
    kind, colon, index = asked.partition(":")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise InputError(f"--evaluate-on {asked}: choose cpu, cuda or cuda:N")
    number = int(index) if index else training_device.index or 0
    if number >= num_gpus():
        raise InputError(f"--evaluate-on {asked}: {num_gpus()} CUDA devices are visible here; use --evaluate-on cpu")
    return torch.device("cuda", number)


def prepare_process(device: torch.device) -> None:
    """Make the settings of this process for everything that it computes on its device."""
    if device.type == "cpu":
        keep_freed_memory()
        return
    torch.cuda.set_device(device)
    torch.backends.cudnn.deterministic = True  # a resumed run repeats the one that was interrupted
    # no TF32, except within `precision.arithmetic`
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def keep_freed_memory() -> None:
    """Make the allocator keep the memory that a step frees for the next step.

    glibc returns large blocks to the system, which fills every page with zeros when the next step asks for them: up to
    a third of a step on a CPU.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return  # another libc has rules of its own
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


class Speeds(NamedTuple):
    """Operations a second (multiplications and additions) of convolutions and matrix products."""

    float32: float
    bfloat16: float

    @property
    def faster(self) -> str:
        """The faster format, as a recipe names it."""
        return "bfloat16" if self.bfloat16 > self.float32 else "float32"

    @property
    def bfloat16_is_slow(self) -> bool:
        """Whether bfloat16 is clearly slower, as on processors with no unit for it, or half of one."""
        return self.bfloat16 < _SLOW * self.float32

    def __str__(self) -> str:
        return f"{_digits(self.float32)} GFLOP/s in float32, {_digits(self.bfloat16)} in bfloat16"


@cache
def measure_speeds(device: torch.device) -> Speeds:
    """Time a convolution and a matrix product in both formats, in turn, for a quarter of a second; the best counts.

    The flags of a processor do not tell its speed: with AVX-512 BF16 alone, bfloat16 is half as fast as float32.
    """
    images = 1 if device.type == "cpu" else 64  # enough for a GPU to be busy
    with torch.inference_mode():
        operations = [(dtype, run) for dtype in _FORMATS for run in _operations(images, dtype, device)]
        for _, run in operations:
            run()  # the first call chooses a kernel
        best = [float("inf")] * len(operations)
        ends = time.perf_counter() + _SECONDS
        is_over = False
        while not is_over:
            best = [min(known, _seconds(run, device)) for known, (_, run) in zip(best, operations, strict=True)]
            is_over = time.perf_counter() >= ends
    work = images * 2.0 * (_EDGE**2 * _CHANNELS**2 * 9 + _SIDE**3)
    seconds = [sum(s for s, (own, _) in zip(best, operations, strict=True) if own == dtype) for dtype in _FORMATS]
    return Speeds(*(work / own for own in seconds))


def slow_at(precision: str, device: torch.device) -> str:
    """Both speeds as text if the recipe's precision is bfloat16 and the device is slow at it, otherwise ""."""
    if precision != "bfloat16" or not (speeds := measure_speeds(device)).bfloat16_is_slow:
        return ""
    return str(speeds)


def _operations(images: int, dtype: torch.dtype, device: torch.device) -> list[Callable[[], Tensor]]:
    """A convolution and a matrix product like those of a detector."""
    pixels = torch.ones(images, _CHANNELS, _EDGE, _EDGE, dtype=dtype, device=device)
    pixels = pixels.to(memory_format=torch.channels_last)
    kernel = torch.ones(_CHANNELS, _CHANNELS, 3, 3, dtype=dtype, device=device)
    kernel = kernel.to(memory_format=torch.channels_last)
    rows = torch.ones(images * _SIDE, _SIDE, dtype=dtype, device=device)
    weights = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    return [lambda: F.conv2d(pixels, kernel, padding=1), lambda: F.linear(rows, weights)]


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """How long an operation takes once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _digits(speed: float) -> str:
    giga = speed / 1e9
    return f"{giga:.0f}" if giga >= 10 else f"{giga:.2g}"
