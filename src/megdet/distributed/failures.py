"""A rank that fails stops the others, with its name and its reason.

A collective cannot say why a peer is gone: gloo says "connection closed", NCCL waits. So the ranks leave notes in the
store of the process group (held by torchrun's agent, rank 0 or a file). A light thread in every rank reads them:

    stopped      the rank at fault and its reason, in a sentence; the first one written counts
    heard        how many ranks have read it
    roll_call    a rank lost a peer and no reason is known: all ranks must answer
    here/RANK    the answer of a rank, as JSON: what it is doing, and where
    told/HOST    the rank that prints the reason for its machine, when its ranks get SIGTERM

torchrun sends SIGTERM to the other ranks of a machine as soon as one has died, and waits 30 seconds. In this time they
find out which one it was, and one of them prints it.
"""

import itertools
import json
import os
import platform
import re
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
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from megdet.distributed.termination import TerminationListener
from megdet.distributed.world import World, name_ranks
from megdet.errors import InputError

PACKAGE = Path(__file__).parents[1]
POLL_SECONDS = 1.0
"""Between two reads of the store by a rank's thread."""
ANSWER_SECONDS = 8.0
"""A rank that does not answer the roll call within this time counts as dead."""
HEARD_SECONDS = 5.0
"""How long rank 0, which may hold the store, waits at most until the others have read why it fails."""
GRACE_SECONDS = 10.0
"""A rank still at work this long after another one stopped is ended: it waits for a collective that never comes."""
STORE_TIMEOUT = timedelta(seconds=30)

_LOST = re.compile("timed out|timeout|connection|read error|writev|broken pipe", re.IGNORECASE)
_LONGEST_REASON = 1000
_numbers = itertools.count()


@contextmanager
def stop_together(world: World) -> Iterator[None]:
    """Around work that the ranks do together: if one rank fails in it, all end.

    The rank that failed raises its own exception. All other ranks raise an InputError that names the rank at fault and
    its reason, even if they only lost the connection to a rank that had lost its own. A rank that is not in a
    collective, so that it notices nothing, is ended with that line and exit code 2. All ranks must enter and leave in
    the same order.
    """
    number = next(_numbers)
    if not torch_distributed.is_initialized():
        yield
        return
    notes = _Notes(number, world)
    with TerminationListener() as listener:
        watch = _Watch(notes, listener, threading.get_ident())
        watch.start()
        try:
            yield
        except BaseException as error:
            watch.has_failed = True
            if not _is_lost_peer(error):
                notes.stop(f"rank {world.rank} stopped: {_one_line(error)}")
                notes.tells_first()  # the command line prints this error
                notes.linger()
                raise
            sentence = _whose_fault(notes, _one_line(error))
            notes.linger()
            if listener.is_told_to_end and not notes.tells_first():
                raise SystemExit(2) from None
            raise InputError(sentence) from None
        else:
            notes.answer("done")
        finally:
            watch.leave()


class _Notes:
    """The notes of one `stop_together` in the store; a store that is gone has no notes and takes none."""

    def __init__(self, number: int, world: World) -> None:
        store = _get_default_store().clone()  # a connection of its own: a collective may be waiting in the other one
        store.set_timeout(STORE_TIMEOUT)
        self._store = PrefixStore(f"megdet/stop{number}", store)
        self._lock = threading.Lock()  # two threads of this rank use it
        self.world = world
        self.is_gone = False
        self.stopped: str | None = None
        self.num_dead = 0

    @contextmanager
    def _opened(self) -> Iterator[Store]:
        with self._lock:
            try:
                yield self._store
            except RuntimeError:
                self.is_gone = True

    def stop(self, sentence: str) -> None:
        """Write which rank is at fault and why, unless that is known."""
        with self._opened() as store:
            store.compare_set("stopped", "", sentence)
        self.read()

    def read(self) -> str | None:
        """Which rank is at fault and why; None while that is not known."""
        with self._opened() as store:
            if self.stopped is None and store.check(["stopped"]):
                self.stopped = store.get("stopped").decode()
                store.add("heard", 1)
        return self.stopped

    def tells_first(self) -> bool:
        """Whether this rank is the one of its machine that prints why they end."""
        told = []
        with self._opened() as store:
            told.append(store.compare_set(f"told/{platform.node()}", "", str(self.world.rank)).decode())
        return told in ([], [str(self.world.rank)])

    def linger(self) -> None:
        """Keep rank 0, which may hold the store, until all living ranks have read the reason, or for HEARD_SECONDS."""
        end, heard, living = time.monotonic() + HEARD_SECONDS, 0, self.world.size - self.num_dead
        while self.world.is_first and heard < living and time.monotonic() < end and not self.is_gone:
            time.sleep(0.1)
            with self._opened() as store:
                heard = store.add("heard", 0)

    def call_the_roll(self) -> None:
        """Ask every rank for an answer."""
        with self._opened() as store:
            store.set("roll_call", "")

    def is_called(self) -> bool:
        """Whether a rank has asked."""
        found = []
        with self._opened() as store:
            found.append(store.check(["roll_call"]))
        return any(found)

    def answer(self, doing: str, place: str = "") -> None:
        """Say what this rank is doing: done, lost, told to end, waiting or busy."""
        with self._opened() as store:
            store.set(f"here/{self.world.rank}", json.dumps([doing, place]))

    def answers(self) -> dict[int, tuple[str, str]]:
        """The answers so far: what a rank is doing, and where."""
        found: dict[int, tuple[str, str]] = {}
        with self._opened() as store:
            for rank in range(self.world.size):
                if store.check([f"here/{rank}"]):
                    doing, place = json.loads(store.get(f"here/{rank}"))
                    found[rank] = doing, place
        return found


class _Watch(threading.Thread):
    """Answers the roll call, and ends a process whose work waits for a rank that has stopped."""

    def __init__(self, notes: _Notes, listener: TerminationListener, main: int) -> None:
        super().__init__(name="megdet stop_together", daemon=True)
        self.notes, self.listener, self.main = notes, listener, main
        self.has_failed = False
        self._has_left = False

    def leave(self) -> None:
        """Stop watching: the work has ended, well or not."""
        self._has_left = True
        self.listener.ring()
        self.join(STORE_TIMEOUT.total_seconds())

    def run(self) -> None:
        """Read the store until the work has ended."""
        has_answered = False
        stopped_at: float | None = None
        while True:
            self.listener.wait(POLL_SECONDS)
            if self._has_left:
                return
            if self.listener.is_told_to_end and not self.has_failed:
                self._end(_why_told_to_end(self.notes))
            if self.notes.is_gone:
                continue  # only SIGTERM can still arrive
            if self.notes.read() is None:
                if not has_answered and not self.has_failed and self.notes.is_called():
                    has_answered = True
                    self.notes.answer(*_whereabouts(self.main))
                continue
            stopped_at = stopped_at or time.monotonic()
            if time.monotonic() - stopped_at > GRACE_SECONDS:
                self._end(str(self.notes.stopped))

    def _end(self, sentence: str) -> None:
        if self._has_left or self.has_failed:
            return
        if not self.listener.is_told_to_end or self.notes.tells_first():
            print(f"megdet (rank {self.notes.world.rank}): {sentence}", file=sys.stderr, flush=True)
        if self.listener.is_told_to_end:
            self.notes.linger()
        os._exit(2)  # the work hangs in a collective, and no exception reaches it there


def _whose_fault(notes: _Notes, reason: str) -> str:
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
        sentence = f"the connection between the ranks broke, although all {size} live ({reason}): the network?"
    notes.stop(sentence)
    return notes.read() or sentence


def _why_told_to_end(notes: _Notes) -> str:
    """The sentence of the rank at fault, also if it died; else that this rank was told to end."""
    told = "told to end (SIGTERM); the same command goes on from the last checkpoint, if there is one"
    if sentence := _known_or_dead(notes, "told to end"):
        return sentence
    notes.stop(f"rank {notes.world.rank} was {told}")
    return told


def _known_or_dead(notes: _Notes, doing: str) -> str | None:
    """Which rank is at fault, after a roll call in which this rank answers `doing`.

    None if all ranks are alive and none knows.
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
    return isinstance(error, RuntimeError) and "gloo" in str(error) and _LOST.search(str(error)) is not None


def _whereabouts(thread: int) -> tuple[str, str]:
    """Whether a thread of this process waits in a collective or is busy, and in which line of which file."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "done", ""
    stack = traceback.extract_stack(frame, limit=60)
    # GradientBuckets waits in a C++ method, which has no Python frame
    collectives, buckets = Path(torch_distributed.__file__).parent, PACKAGE / "distributed/gradients.py"
    files = [Path(entry.filename) for entry in stack]
    is_waiting = buckets in files or any(collectives in file.parents for file in files)
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
