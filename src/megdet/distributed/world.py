"""The processes of a run: this one's rank and device, and the few collectives that the program uses."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from megdet.distributed.parent import end_with_launcher
from megdet.errors import InputError
from megdet.runtime import device_of_rank, prepare_process

DEFAULT_TIMEOUT = timedelta(minutes=30)
CHUNK_BYTES = 64 << 20
"""Bytes of a message of `World.broadcast`; a larger tensor is a message of its own."""
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
    """the index of this process on its host"""

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
        """Call `work` on every rank and return its result; an InputError on any rank is raised on all."""
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
        """Call `work` on rank 0 and return its result, which must be picklable, on every rank; so for an InputError."""
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
        """Overwrite tensors on this rank's device with those of rank 0, in place.

        Every rank gives the same number of tensors, of the same shapes and dtypes, in any memory format. They are sent
        in a few messages.
        """
        if self.size == 1:
            return
        for chunk in _chunks(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in chunk])
            distributed.broadcast(flat, src=0)
            for tensor, part in zip(chunk, torch.split(flat, [t.numel() for t in chunk]), strict=True):
                tensor.copy_(part.view(tensor.shape))


def _chunks(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, up to CHUNK_BYTES together."""
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
    """`rank 1`, or `ranks 0 to 3, 5`; `ranks` must be in rising order. Only the first few ranges are named."""
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
    rank. Raises InputError for a device that does not exist, and if the ranks cannot meet.
    """
    end_with_launcher()
    local_rank, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    torch_device = device_of_rank(device, local_rank)
    if size > 1:
        _check_backend(torch_device.type, size)
    prepare_process(torch_device)
    if size > 1 and not distributed.is_initialized():
        try:
            distributed.init_process_group(
                "nccl" if torch_device.type == "cuda" else "gloo",
                timeout=timeout,
                device_id=torch_device if torch_device.type == "cuda" else None,
            )
        except (ValueError, distributed.DistError) as error:
            what = " ".join(str(error).split())
            raise InputError(
                f"the {size} processes of this run cannot meet ({what}): start them with torchrun, all within --timeout"
            ) from None
    return World(rank, size, torch_device, timeout, local_rank)


def _check_backend(kind: str, size: int) -> None:
    """Refuse a torch that was built without the backend that the ranks need."""
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
