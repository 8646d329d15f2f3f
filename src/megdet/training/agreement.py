"""What one rank knows and all must act upon after the same step: a signal, a fault, a divergence, a due checkpoint.

A signal may reach one rank only, or all at different moments, and every rank has a clock of its own. No rank waits for
that and nothing is sent for it alone: how many ranks know it is summed with the losses of every step. On a GPU the sum
is read one step late, from a copy that has been made meanwhile.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megdet.distributed.termination import STOP_SIGNALS, TerminationListener, exit_code, signal_name
from megdet.distributed.world import World
from megdet.errors import StoppedError
from megdet.training.step import StepResult


class Agreement:
    """What the ranks know.

    Args:
        world: all ranks.
        listener: to the signals of this rank.
        save_seconds: from one checkpoint to the next by rank 0's clock; 0 = none by the clock.
        has_faults: whether this rank has survived something that the others do not know.
    """

    def __init__(
        self,
        world: World,
        listener: TerminationListener,
        save_seconds: float = 0.0,
        has_faults: Callable[[], bool] = lambda: False,
    ) -> None:
        self.world, self.listener, self.save_seconds, self.has_faults = world, listener, save_seconds, has_faults
        self.signal: int | None = None
        """the one that all ranks obey"""
        self.is_save_due = False
        """whether all ranks count this step as saved by the clock"""
        self.has_diverged = False
        """whether this rank has read of a step that the run must go back for"""
        self.is_roll_back_due = False
        """whether all ranks know that one has"""
        self.are_faults_known = False
        """whether all ranks know that one of them has survived something"""
        self._saved_at = time.monotonic()
        self._copied: tuple[Tensor, torch.cuda.Event] | None = None

    def own(self) -> Sequence[bool]:
        """What this rank knows, for the reduction of a step: each of STOP_SIGNALS, the clock's and the log's news."""
        has_clock = self.world.is_first and self.save_seconds > 0
        is_due = has_clock and time.monotonic() - self._saved_at >= self.save_seconds
        return [
            *(number in self.listener.asked for number in STOP_SIGNALS),
            is_due,
            self.has_diverged,
            self.has_faults(),
        ]

    def read(self, result: StepResult) -> None:
        """Learn from a step what all ranks now know; every rank reads every step."""
        known = self.own() if self.world.size == 1 else self._all(result)
        *signals, self.is_save_due, self.is_roll_back_due, self.are_faults_known = known
        self.signal = next((number for number, is_seen in zip(STOP_SIGNALS, signals, strict=True) if is_seen), None)
        self.listener.is_agreed = self.signal is not None

    def saved(self) -> None:
        """Start the time to the next checkpoint now."""
        self._saved_at, self._copied = time.monotonic(), None

    def error(self, what: str) -> StoppedError:
        """The exception that ends the run once the ranks obey a signal; `what` says what is saved."""
        if self.signal is None:
            raise ValueError("no signal was agreed upon")
        return StoppedError(f"stopped by {signal_name(self.signal)}: {what}", exit_code(self.signal))

    def _all(self, result: StepResult) -> Sequence[bool]:
        """What any rank knew in this step, or on a GPU in the one before."""
        if result.notes is None:
            raise ValueError("these steps were made without the notes of the ranks")
        numbers: Tensor | None = result.notes
        if result.notes.is_cuda:
            before, copy = self._copied, result.notes.to("cpu", non_blocking=True)
            self._copied = copy, torch.cuda.current_stream(result.notes.device).record_event()
            if before is not None:
                before[1].synchronize()  # of the step before: the device has work while the host waits
            numbers = None if before is None else before[0]
        return [False] * (len(STOP_SIGNALS) + 3) if numbers is None else [number > 0 for number in numbers.tolist()]
