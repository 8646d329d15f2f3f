"""Events that one rank knows and on which all ranks must act after the same step: signals, faults, due checkpoints.

A signal may reach one rank only, or all at different moments, and every rank has a clock of its own. There is no extra
collective: the number of ranks that know of an event is summed together with the losses of every step. On a GPU the
sum is read one step late, from a copy that was made meanwhile, so that no rank waits.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megdet.distributed.termination import STOP_SIGNALS, TerminationListener, exit_code, signal_name
from megdet.distributed.world import World
from megdet.errors import StoppedError
from megdet.training.step import NUM_NOTES, StepResult


class Agreement:
    """The events that all ranks know of.

    Args:
        world: all ranks.
        listener: receives the signals of this rank.
        save_seconds: from one checkpoint to the next by rank 0's clock; 0 = none by the clock.
        has_faults: whether this rank has survived a fault that the others do not know of.
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
        """the signal that all ranks obey"""
        self.is_save_due = False
        """whether all ranks count this step as saved by the clock"""
        self.has_diverged = False
        """whether this rank has read a step that diverged, so that the run must end or go back"""
        self.is_end_due = False
        """whether all ranks know that a rank has read such a step"""
        self.are_faults_known = False
        """whether all ranks know that one of them has survived a fault"""
        self._saved_at = time.monotonic()
        self._copied: tuple[Tensor, torch.cuda.Event] | None = None

    def own(self) -> Sequence[bool]:
        """The events of this rank, for the reduction of a step: each of STOP_SIGNALS, the clock, divergence, faults."""
        has_clock = self.world.is_first and self.save_seconds > 0
        is_due = has_clock and time.monotonic() - self._saved_at >= self.save_seconds
        return [
            *(number in self.listener.asked for number in STOP_SIGNALS),
            is_due,
            self.has_diverged,
            self.has_faults(),
        ]

    def read(self, result: StepResult) -> None:
        """Read from a step's result which events all ranks now know; every rank reads every step."""
        known = self.own() if self.world.size == 1 else self._all(result)
        *signals, self.is_save_due, self.is_end_due, self.are_faults_known = known
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
        """The events that any rank knew of in this step, or on a GPU in the step before."""
        numbers: Tensor | None = result.notes
        if result.notes.is_cuda:
            before, copy = self._copied, result.notes.to("cpu", non_blocking=True)
            self._copied = copy, torch.cuda.current_stream(result.notes.device).record_event()
            if before is not None:
                before[1].synchronize()  # the copy of the step before: the device has work while the host waits
            numbers = None if before is None else before[0]
        return [False] * NUM_NOTES if numbers is None else [number > 0 for number in numbers.tolist()]
