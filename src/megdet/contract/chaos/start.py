"""One start of a run: wait for a moment, disturb it, wait for its end."""

import signal
import time
from dataclasses import dataclass

from megdet.contract.chaos.command import Command
from megdet.contract.chaos.disturbances import Disturbance
from megdet.contract.chaos.findings import Disturbed
from megdet.contract.chaos.processes import Target
from megdet.contract.chaos.progress import Watched

LOOK_SECONDS = 0.02
_LOOK_AT_SAVING = 0.001
_LONGEST_PAUSE = 2.0
_NOTICED_SECONDS = 15.0
"""Seconds in which losing a process other than a rank may end a run; after that the run counts as going on."""
_SHARE_OF_STEPS = 0.3
"""The part of the time of all steps within which a disturbance of steps is sent."""
_NUM_SAVES = 3
"""The number of checkpoints within which a disturbance of saving is sent."""
_HANGS_AFTER = 180.0
_LONGEST_LOOK = 2.0


class HangError(RuntimeError):
    """The command neither ends nor makes progress."""


@dataclass(frozen=True)
class Times:
    """Seconds in the undisturbed run."""

    loading: float
    stepping: float
    evaluating: float
    """the longest evaluation"""
    whole: float


@dataclass(frozen=True)
class Start:
    """A command that works in a run folder."""

    command: Command
    watched: Watched
    times: Times
    timeout: float
    """seconds that a rank waits for another one"""

    def wait_for(self, own: Disturbance) -> bool:
        """Wait for the moment of a disturbance; False if the command ends before. Raises HangError."""
        if own.moment == "loading":
            return self._sleep(self.command.started + own.delay * self.times.loading - time.monotonic())
        if own.moment == "saving":
            return self._wait_for_saving(int(own.delay * _NUM_SAVES))
        patience = self._patience()
        while self.command.code is None:
            if self.watched.now().activity == own.moment:
                is_step = own.moment == "stepping"
                longest = _SHARE_OF_STEPS * self.times.stepping if is_step else self.times.evaluating
                return self._sleep(own.delay * longest)
            time.sleep(LOOK_SECONDS)
            patience.look()
        return False

    def disturb(self, own: Disturbance, number: int, run: int) -> Disturbed | None:
        """Send the signal and observe its effect; None if no process was left. Raises HangError."""
        target = self._target(own)
        if target is None:
            return None
        before = self.watched.now()
        done = Disturbed(
            number, run, self.command.devices, own.how, target.role, target.pid, before.activity, before.step
        )
        sent = time.monotonic()
        if not target.send(signal.SIGSTOP if own.how in ("SIGSTOP", "pause") else getattr(signal, own.how)):
            return None
        if own.how == "pause":
            time.sleep(own.choice * _LONGEST_PAUSE)
            target.send(signal.SIGCONT)
            return done
        if own.how == "SIGSTOP":
            self._wait_for_others(target)
        must_end = target.role in ("rank", "launcher")
        done.code = self.wait_end() if must_end else self._wait_end_at_most(_NOTICED_SECONDS)
        done.seconds = time.monotonic() - sent if done.code is not None else 0.0
        return done

    def wait_end(self) -> int:
        """Wait for the end of the command; returns its exit code. Raises HangError."""
        patience = self._patience()
        while (code := self.command.code) is None:
            time.sleep(LOOK_SECONDS)
            patience.look()
        return code

    def steps_again(self) -> int:
        """The steps that the next start of an ended command makes again."""
        return max(0, self.watched.now().step - self.watched.saved_step())

    def _target(self, own: Disturbance) -> Target | None:
        targets = self.command.targets()
        fitting = [target for target in targets if target.role == own.role]
        fitting = fitting or [target for target in targets if target.role == "rank"] or targets
        return fitting[int(own.choice * len(fitting))] if fitting else None

    def _wait_for_saving(self, number: int) -> bool:
        """Wait until `number` checkpoints were written and the next is being written."""
        was_saving, patience = False, self._patience()
        while self.command.code is None:
            is_saving = self.watched.is_saving
            if is_saving and not was_saving:
                if number == 0:
                    return True
                number -= 1
            was_saving = is_saving
            time.sleep(_LOOK_AT_SAVING)
            patience.look()
        return False

    def _wait_for_others(self, stopped: Target) -> None:
        """Wait until the other ranks must have noticed the stopped rank, and kill it, since no other process does."""
        end = time.monotonic() + self.timeout + _NOTICED_SECONDS
        while time.monotonic() < end and self.command.code is None:
            others = [own for own in self.command.targets() if own.role == "rank" and own.pid != stopped.pid]
            if not others and (stopped.role == "rank" and self.command.devices > 1):
                break
            time.sleep(10 * LOOK_SECONDS)
        stopped.send(signal.SIGKILL)

    def _wait_end_at_most(self, seconds: float) -> int | None:
        end = time.monotonic() + seconds
        while (code := self.command.code) is None and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
        return code

    def _sleep(self, seconds: float) -> bool:
        """Sleep; returns whether the command still runs afterwards."""
        return self._wait_end_at_most(seconds) is None

    def _patience(self) -> "_Patience":
        return _Patience(self.watched, _HANGS_AFTER + self.timeout + 2 * self.times.whole)


class _Patience:
    def __init__(self, watched: Watched, seconds: float) -> None:
        self.watched, self.seconds = watched, seconds
        self._trace, self._looked, self._waited = watched.trace(), time.monotonic(), 0.0

    def look(self) -> None:
        """Raise HangError if there was no progress for too long; called once a second."""
        passed = time.monotonic() - self._looked
        if passed < 1.0:
            return
        self._looked += passed
        self._waited += min(passed, _LONGEST_LOOK)  # limited, in case this process was stopped too
        if (trace := self.watched.trace()) != self._trace:
            self._trace, self._waited = trace, 0.0
        if self._waited > self.seconds:
            raise HangError(f"no progress and no end for {self.seconds:.0f} seconds")
