"""Fuzzing of readers: each case is read or refused in one clear line, within limits of time and memory, and counted."""

import faulthandler
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from megdet.cli.main import main
from megdet.errors import LONGEST_MESSAGE, InputError

SECONDS = 60
"""Of a processor for a case at most, on a slow machine."""
_WAITING_SECONDS = 1800
"""By the clock, for what waits and computes nothing; the machine may pause us."""
_BYTES = 1 << 30
FORGED = "FORGED"
"""What a text of a file says behind a line break: no line of ours may begin with it."""


class LateError(BaseException):
    """A reader took too long; no reader takes this error for one of its file."""


@dataclass
class Tally:
    """What became of the cases of one format."""

    what: str
    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    """seconds of a processor"""
    most: int = 0
    """bytes of memory that a case took beyond what there was before it"""

    def case(self, read: Callable[[], object], *names: str, most: int = _BYTES) -> str:
        """Read; a refusal must be one short printable line that has one of the names. Returns it, or nothing.

        Anything else that is raised, and what takes too much time or memory, fails.
        """
        started, before, message = time.process_time(), _resident("VmRSS", restart=True), ""
        with _limited():
            try:
                read()
            except InputError as error:
                message = str(error)
        used = max(0, _resident("VmHWM") - before)
        self.slowest, self.most = max(self.slowest, time.process_time() - started), max(self.most, used)
        self.read, self.refused = self.read + (not message), self.refused + bool(message)
        assert used < most, f"{used} bytes for a small file"
        if message:
            check_line(message)
            assert any(name in message for name in names), message
        return message

    def fuzz(self, cases: SearchStrategy[Any], number: int, check: Callable[[Any], object]) -> None:
        """Check so many cases, the same ones every time; some must be read and some refused."""

        @settings(
            max_examples=number,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(cases)
        def run(case: Any) -> None:
            check(case)

        run()
        print(
            f"{self.what}: {self.read + self.refused} cases, {self.read} read, {self.refused} refused, "
            f"slowest {self.slowest:.2f} s, most memory {self.most / 2**20:.0f} MiB"
        )
        assert self.read, f"{self.what}: no case was read, so the cases are for nothing"
        assert self.refused, f"{self.what}: no case was refused"


def check_line(message: str) -> None:
    """Assert that a message is one short printable line."""
    assert len(message) <= LONGEST_MESSAGE, message
    assert message.replace("\u200c", "").replace("\u200d", "").isprintable(), message


def run_verb(*words: str | Path) -> None:
    """A command of ours in this process: raises InputError with its one line, and looks at what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    for line in out.getvalue().split("\n"):
        assert line.replace("\t", "").replace("\u200c", "").replace("\u200d", "").isprintable(), line
        assert not line.startswith(FORGED), line
    lines = err.getvalue().splitlines()
    assert (code, len(lines)) in ((0, 0), (2, 1)), (code, lines)
    if lines:
        raise InputError(lines[0])


@contextmanager
def _limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise LateError(f"no answer in {SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(_WAITING_SECONDS, exit=True, file=sys.__stderr__)  # what hears no signal too
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _resident(key: str, *, restart: bool = False) -> int:
    """Bytes of memory of this process, now (VmRSS) or the most since the last restart (VmHWM); 0 without /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10
