"""If a rank fails, the others stop with a message that names it and its reason.

A collective cannot tell why a peer is gone: gloo says "connection closed", NCCL waits. So the ranks leave notes in the
store of the process group, and a thread in every rank reads them.

torchrun sends SIGTERM to the other ranks of a machine as soon as one has died, and waits 30 seconds. In this time they
find out which one it was, and one of them prints it. If all are alive, SIGTERM is from outside. So are SIGUSR1 and
Ctrl-C. Then a training stops in order, at a step on which all ranks agree (`training/agreement.py`); other verbs end at
once.
"""

import itertools
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch import distributed as torch_distributed
from torch.distributed import DistError

from megdet.distributed.notes import STORE_SECONDS, Notes
from megdet.distributed.termination import STOP_SIGNALS, TerminationListener, exit_code, stopped_by
from megdet.distributed.world import World, name_ranks
from megdet.errors import InputError, StoppedError

PACKAGE = Path(__file__).parents[1]
POLL_SECONDS = 1.0
"""Seconds between two reads of the store by a rank's thread."""
ANSWER_SECONDS = 8.0
"""A rank that does not answer the roll call within this time counts as dead."""
GRACE_SECONDS = 10.0
"""A rank still at work this long after another one stopped is ended: it waits for a collective that never comes."""

_LOST = re.compile("timed out|timeout|connection|read error|writev|broken pipe", re.IGNORECASE)
_LONGEST_REASON = 1000
_numbers = itertools.count()


@contextmanager
def stop_together(world: World, *, heeds_signals: bool = False) -> Iterator[TerminationListener]:
    """A context for work that the ranks do together: if one rank fails in it, all end.

    The rank that failed raises its own exception. All other ranks raise an InputError that names the rank at fault and
    its reason, even if they only lost the connection to a rank that had lost its own. A rank that is not in a
    collective, so that it notices nothing, is ended with that line and exit code 2. All ranks must enter and leave in
    the same order.

    Yields the listener for SIGTERM, which ends all ranks with exit code 143. With `heeds_signals` it listens to SIGUSR1
    and Ctrl-C as well, and inside `listener.heeded()` the caller handles the signals: all ranks must agree, set
    `is_agreed` and raise StoppedError; that of rank 0 is raised.
    """
    number = next(_numbers)
    if not torch_distributed.is_initialized():
        with TerminationListener(STOP_SIGNALS if heeds_signals else (), raises=True) as listener:
            yield listener
        return
    notes = Notes(number, world)
    with TerminationListener(STOP_SIGNALS if heeds_signals else (signal.SIGTERM,)) as listener:
        watch = _Watch(notes, listener, threading.get_ident())
        watch.start()
        try:
            yield listener
        except StoppedError as error:
            watch.has_failed = True
            if listener.is_agreed:
                notes.leave_in_order()
                is_silent = not world.is_first
            else:
                notes.stop(_stopped_rank(world, error), error.code)
                is_silent = not notes.tells_first()
                notes.linger()
            if is_silent:
                raise SystemExit(error.code) from None
            raise
        except BaseException as error:
            watch.has_failed = True
            if not _is_lost_peer(error):
                notes.stop(f"rank {world.rank} stopped: {_one_line(error)}")
                notes.tells_first()  # the command line prints this error
                notes.linger()
                raise
            sentence = _whose_fault(notes, _one_line(error))
            notes.linger()
            is_by_signal = bool(listener.told) or notes.code != 2
            if is_by_signal and not notes.tells_first():
                raise SystemExit(notes.code) from None
            raise (InputError(sentence) if notes.code == 2 else StoppedError(sentence, notes.code)) from None
        else:
            notes.answer("done")
        finally:
            watch.leave()
            notes.close()


class _Watch(threading.Thread):
    """Answers the roll call, and ends a process whose work waits for a rank that has stopped."""

    def __init__(self, notes: Notes, listener: TerminationListener, main: int) -> None:
        super().__init__(name="megdet stop_together", daemon=True)
        self.notes, self.listener, self.main = notes, listener, main
        self.has_failed = False
        self._has_left = False
        self._has_called = False

    def leave(self) -> None:
        """Stop watching: the work has ended, with success or not."""
        self._has_left = True
        self.listener.ring()
        self.join(STORE_SECONDS)

    def run(self) -> None:
        """Read the store until the work has ended."""
        has_answered = False
        stopped_at: float | None = None
        while True:
            self.listener.wait(POLL_SECONDS)
            if self._has_left:
                return
            if self.listener.told.count(signal.SIGINT) > 1:
                os._exit(exit_code(signal.SIGINT))
            if self.listener.told and not self.has_failed and not self.listener.is_agreed:
                self._obey()
            if self.notes.is_gone:
                continue  # only a signal can still arrive
            if self.notes.read() is None:
                if not has_answered and not self.has_failed and self.notes.is_called():
                    has_answered = True
                    self.notes.answer(*_whereabouts(self.main))
                continue
            stopped_at = stopped_at or time.monotonic()
            if self.notes.code != 2 or time.monotonic() - stopped_at > GRACE_SECONDS:
                self._end(str(self.notes.stopped), self.notes.code)

    def _obey(self) -> None:
        """End this rank for a signal, unless the main thread handles it and all ranks are alive."""
        if self.listener.is_told_to_end and not self._has_called:
            self._has_called = True  # torchrun sends SIGTERM when a rank has died
            if sentence := _known_or_dead(self.notes, "told to end"):
                self._end(sentence, self.notes.code)
        if not self.listener.is_heeded:
            stopped = stopped_by(self.listener.told[0])
            self.notes.stop(_stopped_rank(self.notes.world, stopped), stopped.code)
            self._end(str(stopped), stopped.code)

    def _end(self, sentence: str, code: int) -> None:
        if self._has_left or self.has_failed or self.listener.is_agreed:
            return
        is_by_signal = bool(self.listener.told) or code != 2
        if not is_by_signal or self.notes.tells_first():
            print(f"megdet (rank {self.notes.world.rank}): {sentence}", file=sys.stderr, flush=True)
        if is_by_signal:
            self.notes.linger()
        os._exit(code)  # the work hangs in a collective, and no exception reaches it there


def _stopped_rank(world: World, stopped: StoppedError) -> str:
    return f"rank {world.rank} was {stopped}"


def _whose_fault(notes: Notes, reason: str) -> str:
    """The sentence of the rank at fault; if it left none, what the roll call shows about the failed collective."""
    size = notes.world.size
    is_timeout = re.search("timed out|timeout", reason, re.IGNORECASE) is not None
    if sentence := _known_or_dead(notes, "lost"):
        return sentence
    busy = [(rank, place) for rank, (doing, place) in sorted(notes.answers().items()) if doing == "busy"]
    limit = _minutes(notes.world.timeout)
    if is_timeout and busy:
        where = ", ".join(f"rank {rank} was in {place}" for rank, place in busy)
        sentence = (
            f"{name_ranks([rank for rank, _ in busy])} kept the others waiting longer than {limit} (--timeout): {where}"
        )
    elif is_timeout:
        sentence = f"the ranks waited for each other longer than {limit}: give a longer --timeout if one is slow"
    else:
        sentence = f"the connection between the ranks broke, although all {size} are alive ({reason}): the network?"
    notes.stop(sentence)
    return notes.read() or sentence


def _known_or_dead(notes: Notes, doing: str) -> str | None:
    """A sentence on the rank at fault, after a roll call in which this rank answers `doing`.

    None if all ranks are alive and no reason is known.
    """
    if notes.stopped:  # rank 0, and the store with it, may be gone by now
        return notes.stopped
    size = notes.world.size
    notes.answer(doing)
    notes.call_the_roll()
    end = time.monotonic() + ANSWER_SECONDS
    answers: dict[int, tuple[str, str]] = {}
    while time.monotonic() < end and len(answers) < size and not notes.is_gone:
        if sentence := notes.read():
            return sentence
        answers = notes.answers()
        time.sleep(0.2)
    if sentence := notes.read():
        return sentence
    if notes.is_gone:
        return (
            "lost the connection to the other ranks and to the store of the process group: the process that holds it, "
            "rank 0 or torchrun's agent, died without a word (killed, or out of memory?)"
        )
    silent = [rank for rank in range(size) if rank not in answers]
    if not silent:
        return None
    notes.num_dead = len(silent)
    sentence = f"{name_ranks(silent)} died without a word (killed, or out of memory?)"
    notes.stop(sentence)
    return notes.read() or sentence


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because of another rank."""
    if isinstance(error, DistError):
        return True
    if not isinstance(error, RuntimeError) or _LOST.search(str(error)) is None:
        return False
    # gloo names itself in most of its messages, not in all
    frames = traceback.extract_tb(error.__traceback__)
    return "gloo" in str(error) or (bool(frames) and _is_collective(Path(frames[-1].filename)))


def _is_collective(file: Path) -> bool:
    """Whether a line of this file may wait for other ranks: a method in C++ has no Python frame of its own."""
    own = (PACKAGE / "distributed" / name for name in ("gradients.py", "exact_gradients.py"))
    return file in own or Path(torch_distributed.__file__).parent in file.parents


def _whereabouts(thread: int) -> tuple[str, str]:
    """Whether a thread of this process waits in a collective or is busy, and in which line of which file."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "done", ""
    stack = traceback.extract_stack(frame, limit=60)
    is_waiting = any(_is_collective(Path(entry.filename)) for entry in stack)
    entry = next((entry for entry in reversed(stack) if PACKAGE in Path(entry.filename).parents), stack[-1])
    place = "/".join(Path(entry.filename).parts[-2:])
    return ("waiting" if is_waiting else "busy"), f"{place}:{entry.lineno} ({entry.name})"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:_LONGEST_REASON]
    if isinstance(error, InputError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _minutes(timeout: timedelta) -> str:
    minutes = timeout.total_seconds() / 60
    return f"{minutes:.3g} minute{'' if minutes == 1 else 's'}"
