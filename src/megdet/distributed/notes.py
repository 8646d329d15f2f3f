"""The notes of the ranks in the store of the process group (held by torchrun's agent, rank 0 or a file).

stopped      the code with which all end, the rank at fault and its reason, in a sentence; the first written counts
heard        how many ranks have read it
roll_call    a rank lost a peer and no reason is known: all ranks must answer
here/RANK    the answer of a rank, as JSON: what it is doing, and where
told/HOST    the rank that prints the reason for its machine, when its ranks get SIGTERM
"""

import json
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from megdet.distributed.world import World

HEARD_SECONDS = 5.0
"""How long rank 0, which may hold the store, waits at most until the others have read why it fails."""
STORE_TIMEOUT = timedelta(seconds=30)


class Notes:
    """The notes of one `stop_together` in the store; a store that is gone has no notes and takes none."""

    def __init__(self, number: int, world: World) -> None:
        store = _get_default_store().clone()  # a connection of its own: a collective may be waiting in the other one
        store.set_timeout(STORE_TIMEOUT)
        self._store = PrefixStore(f"megdet/stop{number}", store)
        self._lock = threading.Lock()  # two threads of this rank use it
        self.world = world
        self.is_gone = False
        self.stopped: str | None = None
        self.code = 2
        """with what a rank ends that has read why"""
        self.num_dead = 0

    @contextmanager
    def _opened(self) -> Iterator[Store]:
        with self._lock:
            try:
                yield self._store
            except RuntimeError:
                self.is_gone = True

    def stop(self, sentence: str, code: int = 2) -> None:
        """Write which rank is at fault and why, and with what code all end, unless that is known."""
        with self._opened() as store:
            store.compare_set("stopped", "", json.dumps([code, sentence]))
        self.read()

    def read(self) -> str | None:
        """Which rank is at fault and why; None while that is not known."""
        with self._opened() as store:
            if self.stopped is None and store.check(["stopped"]):
                self.code, self.stopped = json.loads(store.get("stopped"))
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

    def leave_in_order(self) -> None:
        """Say that this rank is done; rank 0, which may hold the store, waits until all are, or for HEARD_SECONDS."""
        self.answer("done")
        end = time.monotonic() + HEARD_SECONDS
        while self.world.is_first and time.monotonic() < end and not self.is_gone:
            if sum(doing == "done" for doing, _ in self.answers().values()) == self.world.size:
                return
            time.sleep(0.05)

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
