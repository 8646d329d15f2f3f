"""The machine: its devices, processor and speed, and the settings that a process makes once.

All questions to the machine are asked here or in `memory.py`, so that a test or a bench can pretend another machine.
"""

import os
import platform
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
from megdet.memory import keep_freed_memory

Kind = Literal["cpu", "cuda"]
_SECONDS = 0.25
"""Seconds that measuring takes; each operation runs at least once."""
_SLOW = 0.75
"""bfloat16 counts as slow below this part of float32's speed: so low that repeated measurements agree."""
_FORMATS = (torch.float32, torch.bfloat16)
_CHANNELS, _EDGE, _SIDE = 128, 36, 512
_THREADS: list[int] = []
"""What `usable_threads` is within each `operations_on_one_thread` that is entered."""


def num_gpus() -> int:
    """Number of GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def num_ranks_here() -> int:
    """Number of ranks on this machine, as torchrun gives it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable_cores() -> int:
    """Number of processor cores that this process may use, which a container may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Default number of loading processes of this rank: its share of the cores minus one, from 1 to 8."""
    return max(1, min(8, usable_cores() // num_ranks_here() - 1))


@contextmanager
def operations_on_one_thread() -> Iterator[None]:
    """Within it no operation of torch splits its work among threads.

    How a sum is split decides how it is rounded, so the bits of a result would depend on the number of threads.
    """
    before = torch.get_num_threads()
    _THREADS.append(usable_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _THREADS.pop()


def usable_threads() -> int:
    """Number of threads that this process may compute with, also within `operations_on_one_thread`."""
    return _THREADS[-1] if _THREADS else torch.get_num_threads()


def processor_name() -> str:
    """The model of the processor, or its architecture if the system does not tell."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def kind_of_machine(device: torch.device) -> str:
    """What two machines must have in common for the same operations to give the same bits: processor or GPU, torch."""
    names = [own["name"] for own in accelerators(str(device))] or [processor_name()]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{', '.join(dict.fromkeys(names))}, {capability}, torch {torch.__version__}"


@cache
def is_intel_processor() -> bool:
    """Whether the processor is Intel's, on which MKL computes at its full speed."""
    return _cpuinfo("vendor_id") == "GenuineIntel" or "GenuineIntel" in platform.processor()


def _cpuinfo(key: str) -> str:
    """A value of the first processor in /proc/cpuinfo; empty if there is no such line."""
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
    """The kind of device for a value of --device: cpu, cuda, or empty for a GPU if there is one. Raises InputError."""
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
    """Make the settings of this process for all that it computes on its device."""
    if device.type == "cpu":
        keep_freed_memory()
        return
    torch.cuda.set_device(device)
    torch.backends.cudnn.deterministic = True  # a resumed run must repeat the interrupted one
    # no TF32, except within `precision.arithmetic`
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


class Speeds(NamedTuple):
    """Operations a second (multiplications and additions) of convolutions and matrix products."""

    float32: float
    bfloat16: float

    @property
    def faster(self) -> str:
        """The faster precision, as a recipe names it."""
        return "bfloat16" if self.bfloat16 > self.float32 else "float32"

    @property
    def bfloat16_is_slow(self) -> bool:
        """Whether bfloat16 is clearly slower, as on processors without a full unit for it."""
        return self.bfloat16 < _SLOW * self.float32

    def __str__(self) -> str:
        return f"{_digits(self.float32)} GFLOP/s in float32, {_digits(self.bfloat16)} in bfloat16"


@cache
def measure_speeds(device: torch.device) -> Speeds:
    """Time a convolution and a matrix product in both dtypes, in turn, for a quarter of a second; the best times count.

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
    """Seconds of one run of an operation."""
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
