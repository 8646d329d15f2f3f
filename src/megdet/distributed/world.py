"""This process among the others: rank, device, and the few collectives the rest of the program uses."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from megdet.errors import InputError

DEFAULT_TIMEOUT = timedelta(minutes=30)
CHUNK_BYTES = 64 << 20
"""Of a message of `World.broadcast`, but for larger tensors."""
_MOST_RUNS = 6
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run; one process without torchrun is a world of size 1 with no process group behind it."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta = DEFAULT_TIMEOUT
    """how long a collective waits for another rank"""
    local_rank: int = 0
    """this process among those of its host"""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the files."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            distributed.barrier()

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns on this rank; an InputError of any rank is raised on all, so that none waits in vain."""
        result: Any = None
        problem: InputError | None = None
        try:
            result = work()
        except InputError as found:
            problem = found
        for error in self.gather_objects(problem):
            if error is not None:
                raise error
        return cast(T, result)

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; an InputError of it is raised on all. It must be picklable."""
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = work()
            except InputError as problem:
                answer[1] = problem
        if self.size > 1:
            distributed.broadcast_object_list(answer, src=0)
        result, error = answer
        if error is not None:
            raise error
        return cast(T, result)

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors of this rank's device by those of rank 0, in place.

        Every rank gives as many, of the same shapes and dtypes, in any memory format. They travel in a few messages.
        """
        if self.size == 1:
            return
        for chunk in _chunks(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in chunk])
            distributed.broadcast(flat, src=0)
            for tensor, part in zip(chunk, torch.split(flat, [t.numel() for t in chunk]), strict=True):
                tensor.copy_(part.view(tensor.shape))


def _chunks(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, up to CHUNK_BYTES together."""
    chunk: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if chunk and (tensor.dtype != chunk[0].dtype or size + tensor.nbytes > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(tensor)
        size += tensor.nbytes
    if chunk:
        yield chunk


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 1`, or `ranks 0 to 3, 5`; they must rise. Of many runs of neighbours the first few are named."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs[:_MOST_RUNS]]
    if left := sum(map(len, runs[_MOST_RUNS:])):
        words.append(f"and {left} more")
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"


def start_world(device: str = "", timeout: timedelta = DEFAULT_TIMEOUT) -> World:
    """Join the processes that torchrun started (or be alone) and choose this process's device.

    `device` is cpu, cuda or empty for the GPU where there is one; `timeout` is how long a collective waits for another
    rank. Raises InputError for a device that is not there, and where the ranks cannot meet.
    """
    local_rank, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device {kind}: choose cpu or cuda")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: no CUDA device is visible here; use --device cpu")
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; "
                "start fewer processes with --nproc-per-node"
            )
    if size > 1:
        _check_backend(kind, size)
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        use_precision("float32")  # until a recipe asks for something else
        torch.backends.cudnn.deterministic = True  # a resumed run repeats the one that was interrupted
        torch_device = torch.device("cuda", local_rank)
    else:
        torch_device = torch.device("cpu")
        _keep_freed_memory()
    if size > 1 and not distributed.is_initialized():
        try:
            distributed.init_process_group(
                "nccl" if kind == "cuda" else "gloo",
                timeout=timeout,
                device_id=torch_device if kind == "cuda" else None,
            )
        except (ValueError, distributed.DistError) as error:
            what = " ".join(str(error).split())
            raise InputError(
                f"the {size} processes of this run cannot meet ({what}): start them with torchrun, all within --timeout"
            ) from None
    return World(rank, size, torch_device, timeout, local_rank)


def _keep_freed_memory() -> None:
    """Let the allocator keep what a step frees for the next step.

    glibc hands large blocks back to the system, which fills every page with zeros again when the next step asks: up to
    a third of a step on a CPU.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return  # another libc has rules of its own
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def _check_backend(kind: str, size: int) -> None:
    """Refuse a torch that was built without what the ranks would talk by."""
    name, is_there = (
        ("NCCL", distributed.is_nccl_available) if kind == "cuda" else ("gloo", distributed.is_gloo_available)
    )
    if not distributed.is_available() or not is_there():
        instead = "use --device cpu or one process" if kind == "cuda" else "use one process"
        raise InputError(
            f"{size} processes on {kind} talk by {name}, and torch {torch.__version__} was built without it: install "
            f"a torch that has it, or {instead}"
        )


def stop_world() -> None:
    """Leave the process group, if there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def use_precision(precision: str) -> None:
    """Let a GPU compute float32 convolutions and matrix products in TF32, or not, as a recipe's precision says.

    It holds for the whole process; a device without TF32 computes in float32. torch's default is TF32 in convolutions
    alone. Here float32 means float32 in both, whatever the micro-batch.
    """
    # not by torch's newer names for it (fp32_precision): reading the flags below, as torch.compile does, then fails
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
