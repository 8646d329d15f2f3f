"""Checkpoints are written by a thread of rank 0, from a copy in memory, while the training goes on.

A step waits for the copy, and a checkpoint for the previous one if that is still being written. A copy that is only
looked at (a line of the ledger) waits for neither: while the memory of the copies is in use it gets memory of its own.
"""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from megdet.errors import InputError
from megdet.run_folder.checkpoint_files import (
    Kind,
    LeftBehindError,
    delete_old_checkpoints,
    latest_checkpoint,
    save_checkpoint,
)
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_state import RunState
from megdet.training.trainer import Tensors


class CheckpointWriter:
    """Writes the checkpoints of a run one after the other; `leave` waits for the last.

    Args:
        folder: the run folder, locked by this process.
        keep: number of newest checkpoints to keep.
        saved_step: the step of the folder's newest checkpoint, 0 if it has none.
    """

    def __init__(self, folder: RunFolder, keep: int, saved_step: int) -> None:
        self.folder, self.keep = folder, keep
        self.saved_step = saved_step
        """the step of the newest checkpoint that is on the disk"""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="megdet checkpoints")
        self._jobs: list[Future[None]] = []
        self._failed: list[tuple[str, InputError]] = []
        self._copies: Tensors = {}
        """memory that every checkpoint uses again: allocating it would cost more than the copy"""
        self._beside: Future[None] | None = None
        """looks at a copy in memory of its own"""

    def save(
        self,
        state: RunState,
        tensors: Tensors,
        spared: Collection[int],
        first: Callable[[], None] | None = None,
        look: Callable[[Tensors], None] | None = None,
    ) -> None:
        """Copy the tensors and write the checkpoint later, after calling `first`; `spared` as in `save_checkpoint`.

        `look` gets the copy before; the checkpoint is written even if it fails.
        """
        self.wait()  # the copies are still being written
        self._copies = copied(tensors, self._copies)
        if look is not None:
            self.later(partial(look, self._copies))
        self._jobs.append(self._thread.submit(self._write, state, spared, first))

    def look_at_copy(self, tensors: Tensors, look: Callable[[Tensors], None]) -> None:
        """Copy the tensors and give the copy to `look`, after the checkpoints given before are written."""
        if self._beside is not None:
            self._beside.result()  # one copy more is enough
        is_beside = self.is_writing
        copies = copied(tensors, {} if is_beside else self._copies)
        if not is_beside:
            self._copies = copies
        job = self._thread.submit(self._do, partial(look, copies))
        self._beside = job if is_beside else None
        self._jobs.append(job)

    def later(self, work: Callable[[], None], then: Callable[[], None] | None = None) -> None:
        """Call `work` once the checkpoints given before are written, and `then` after it, if it did not fail."""
        self._jobs.append(self._thread.submit(self._do, work, then))

    def delete_old(self, spared: Collection[int]) -> None:
        """Delete old checkpoints, later."""
        self.later(lambda: delete_old_checkpoints(self.folder, self.keep, spared))

    @property
    def is_writing(self) -> bool:
        """Whether some checkpoint is not on the disk yet."""
        return not all(job.done() for job in self._jobs)

    def wait(self) -> None:
        """Wait until all checkpoints are written."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def failures(self) -> list[str]:
        """What could not be written since the last call, a sentence each.

        Raises InputError if the run has no checkpoint at all.
        """
        failed, self._failed = self._failed, []
        if not failed:
            return []
        if latest_checkpoint(self.folder) is None:
            raise failed[-1][1]
        kept = f"the run goes on, the checkpoint of step {self.saved_step} is kept"
        return [f"Warning: {what}{error}; {kept}" for what, error in failed]

    def leave(self, kind: type[BaseException] | None, *_: object) -> None:
        """End a `with` block: wait until all is written.

        Raises InputError for an unreported failure, unless another exception ends the run.
        """
        self._thread.shutdown()
        if kind is None:
            self.wait()
            if failed := [error for _, error in self._failed if not isinstance(error, LeftBehindError)]:
                raise failed[-1]

    def _write(self, state: RunState, spared: Collection[int], first: Callable[[], None] | None) -> None:
        try:
            if first is not None:
                first()
            save_checkpoint(self.folder, state, self._copies, self.keep, spared)
            self.saved_step = state.step
        except LeftBehindError as error:
            self.saved_step = state.step
            self._failed.append(("", error))
        except InputError as error:
            self._failed.append((f"the checkpoint of step {state.step} is not saved: ", error))

    def _do(self, work: Callable[[], None], then: Callable[[], None] | None = None) -> None:
        try:
            work()
            if then is not None:
                then()
        except InputError as error:
            self._failed.append(("", error))


@torch.no_grad()
def copied(tensors: Mapping[Kind, Mapping[str, Tensor]], memory: Tensors) -> Tensors:
    """Copies on the CPU, in the memory of an earlier copy where it fits."""
    copies: Tensors = {}
    devices = set()
    for kind, group in tensors.items():
        copies[kind] = {}
        for name, tensor in group.items():
            copy = memory.get(kind, {}).get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copy.copy_(tensor, non_blocking=True)
            copies[kind][name] = copy
            devices.add(tensor.device)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return copies
