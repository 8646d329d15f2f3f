"""The notes of the ranks in the store of the process group (held by torchrun's agent, rank 0 or a file).

stopped      the exit code for all ranks, and a sentence with the rank at fault and its reason; the first written counts
heard        how many ranks have read `stopped`
roll_call    a rank lost a peer and no reason is known: all ranks must answer
here/RANK    the answer of a rank, as JSON: what it is doing, and where
told/HOST    the rank that prints the reason for its machine, when its ranks get SIGTERM
"""

import json
import platform
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Generic, TypeVar

from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from megdet.distributed.world import World

HEARD_SECONDS = 5.0
"""Longest time in seconds that rank 0, which may hold the store, waits for the others to read why it fails."""
STORE_SECONDS = 30
"""Seconds without an answer after which the store counts as gone."""
T = TypeVar("T")


class _Question(Generic[T]):
    def __init__(self, asks: Callable[[Store], T], otherwise: T) -> None:
        self.asks, self.answer = asks, otherwise
        self.is_answered = threading.Event()


class Notes:
    """The notes of one `stop_together` in the store; if the store is gone, reads find nothing and writes do nothing."""

    def __init__(self, number: int, world: World) -> None:
        store = _get_default_store().clone()  # a second connection: a collective may be waiting in the first
        store.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._store = PrefixStore(f"megdet/stop{number}", store)
        self._questions: queue.SimpleQueue[_Question[Any] | None] = queue.SimpleQueue()
        self.world = world
        self.is_gone = False
        self.stopped: str | None = None
        self.code = 2
        """the exit code of a rank that has read `stopped`"""
        self.num_dead = 0
        threading.Thread(target=self._answer_questions, name="megdet notes", daemon=True).start()

    def close(self) -> None:
        """End the thread that asks the store."""
        self._questions.put(None)

    def _ask(self, asks: Callable[[Store], T], otherwise: T) -> T:
        """The answer of the store, or `otherwise` if it is gone; only the first question waits to find that out.

        A thread of its own asks: most calls of a store have no timeout, and a host that is cut off never answers.
        """
        question = _Question(asks, otherwise)
        if self.is_gone:
            return otherwise
        self._questions.put(question)
        for _ in range(STORE_SECONDS):  # counted, since the clock goes on while this process is stopped
            if question.is_answered.wait(1.0):
                return question.answer
        self.is_gone = True
        return otherwise

    def _answer_questions(self) -> None:
        while (question := self._questions.get()) is not None:
            try:
                question.answer = question.asks(self._store)
            except RuntimeError:
                self.is_gone = True
            question.is_answered.set()

    def stop(self, sentence: str, code: int = 2) -> None:
        """Write which rank is at fault, why, and the exit code for all, unless that was written before."""
        self._ask(lambda store: store.compare_set("stopped", "", json.dumps([code, sentence])), None)
        self.read()

    def read(self) -> str | None:
        """The sentence with the rank at fault and its reason; None while it is not known."""

        def look(store: Store) -> None:
            if self.stopped is None and store.check(["stopped"]):
                self.code, self.stopped = json.loads(store.get("stopped"))
                store.add("heard", 1)

        self._ask(look, None)
        return self.stopped

    def tells_first(self) -> bool:
        """Whether this rank is the one on its machine that prints the reason."""
        own = str(self.world.rank)
        return self._ask(lambda store: store.compare_set(f"told/{platform.node()}", "", own).decode(), own) == own

    def linger(self) -> None:
        """Keep rank 0, which may hold the store, until all living ranks have read the reason, or for HEARD_SECONDS."""
        end, heard, living = time.monotonic() + HEARD_SECONDS, 0, self.world.size - self.num_dead
        while self.world.is_first and heard < living and time.monotonic() < end and not self.is_gone:
            time.sleep(0.1)
            heard = self._ask(lambda store: store.add("heard", 0), 0)

    def leave_in_order(self) -> None:
        """Note that this rank is done; rank 0, which may hold the store, waits for all, at most HEARD_SECONDS."""
        self.answer("done")
        end = time.monotonic() + HEARD_SECONDS
        while self.world.is_first and time.monotonic() < end and not self.is_gone:
            if sum(doing == "done" for doing, _ in self.answers().values()) == self.world.size:
                return
            time.sleep(0.05)

    def call_the_roll(self) -> None:
        """Ask every rank what it is doing."""
        self._ask(lambda store: store.set("roll_call", ""), None)

    def is_called(self) -> bool:
        """Whether a rank has called the roll."""
        return self._ask(lambda store: store.check(["roll_call"]), False)

    def answer(self, doing: str, place: str = "") -> None:
        """Note what this rank is doing: done, lost, told to end, waiting or busy."""
        self._ask(lambda store: store.set(f"here/{self.world.rank}", json.dumps([doing, place])), None)

    def answers(self) -> dict[int, tuple[str, str]]:
        """The answers so far: what a rank is doing, and where."""
        found: dict[int, tuple[str, str]] = {}

        def look(store: Store) -> None:
            for rank in range(self.world.size):
                if store.check([f"here/{rank}"]):
                    doing, place = json.loads(store.get(f"here/{rank}"))
                    found[rank] = doing, place

        self._ask(look, None)
        return found
