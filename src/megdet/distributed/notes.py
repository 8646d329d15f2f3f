"""The notes of the ranks in the store of the process group (held by torchrun's agent, rank 0 or a file).

stopped      the code with which all end, the rank at fault and its reason, in a sentence; the first written counts
heard        how many ranks have read it
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
"""How long rank 0, which may hold the store, waits at most until the others have read why it fails."""
STORE_SECONDS = 30
"""A store that answers nothing for so long is gone."""
T = TypeVar("T")


class _Question(Generic[T]):
    def __init__(self, asks: Callable[[Store], T], otherwise: T) -> None:
        self.asks, self.answer = asks, otherwise
        self.is_answered = threading.Event()


class Notes:
    """The notes of one `stop_together` in the store; a store that is gone has no notes and takes none."""

    def __init__(self, number: int, world: World) -> None:
        store = _get_default_store().clone()  # a connection of its own: a collective may be waiting in the other one
        store.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._store = PrefixStore(f"megdet/stop{number}", store)
        self._questions: queue.SimpleQueue[_Question[Any] | None] = queue.SimpleQueue()
        self.world = world
        self.is_gone = False
        self.stopped: str | None = None
        self.code = 2
        """with what a rank ends that has read why"""
        self.num_dead = 0
        threading.Thread(target=self._answer_questions, name="megdet notes", daemon=True).start()

    def close(self) -> None:
        """End the thread that asks the store."""
        self._questions.put(None)

    def _ask(self, asks: Callable[[Store], T], otherwise: T) -> T:
        """What the store answers; `otherwise` where it is gone: that is waited for once, not with every question.

        A thread of its own asks: most questions to a store have no timeout, and a host that is cut off sends no word.
        """
        question = _Question(asks, otherwise)
        if self.is_gone:
            return otherwise
        self._questions.put(question)
        for _ in range(STORE_SECONDS):  # not by the clock, which goes on while this process is stopped
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
        """Write which rank is at fault and why, and with what code all end, unless that is known."""
        self._ask(lambda store: store.compare_set("stopped", "", json.dumps([code, sentence])), None)
        self.read()

    def read(self) -> str | None:
        """Which rank is at fault and why; None while that is not known."""

        def look(store: Store) -> None:
            if self.stopped is None and store.check(["stopped"]):
                self.code, self.stopped = json.loads(store.get("stopped"))
                store.add("heard", 1)

        self._ask(look, None)
        return self.stopped

    def tells_first(self) -> bool:
        """Whether this rank is the one of its machine that prints why they end."""
        own = str(self.world.rank)
        return self._ask(lambda store: store.compare_set(f"told/{platform.node()}", "", own).decode(), own) == own

    def linger(self) -> None:
        """Keep rank 0, which may hold the store, until all living ranks have read the reason, or for HEARD_SECONDS."""
        end, heard, living = time.monotonic() + HEARD_SECONDS, 0, self.world.size - self.num_dead
        while self.world.is_first and heard < living and time.monotonic() < end and not self.is_gone:
            time.sleep(0.1)
            heard = self._ask(lambda store: store.add("heard", 0), 0)

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
        self._ask(lambda store: store.set("roll_call", ""), None)

    def is_called(self) -> bool:
        """Whether a rank has asked."""
        return self._ask(lambda store: store.check(["roll_call"]), False)

    def answer(self, doing: str, place: str = "") -> None:
        """Say what this rank is doing: done, lost, told to end, waiting or busy."""
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
