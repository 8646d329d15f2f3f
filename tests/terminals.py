"""A command in a real pseudo-terminal, and what a person would see there."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from struct import pack

HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


@dataclass
class Seen:
    """What a command wrote to its terminal."""

    code: int
    raw: bytes

    @property
    def text(self) -> str:
        """Without control codes."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode()).replace("\r", "")

    @property
    def is_cursor_left_visible(self) -> bool:
        return self.raw.rfind(SHOW) > self.raw.rfind(HIDE) or HIDE not in self.raw


def run_in_terminal(
    *words: object,
    columns: int = 80,
    rows: int = 24,
    until: bytes | None = None,
    then: signal.Signals = signal.SIGINT,
    cwd: Path | None = None,
    term: str = "xterm-256color",
) -> Seen:
    """Run megdet in a terminal to its end; as soon as it has written `until`, it gets the signal."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, pack("HHHH", rows, columns, 0, 0))
    environment = {**os.environ, "TERM": term, "OMP_NUM_THREADS": "1"}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "megdet", *map(str, words)]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=cwd,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    raw, is_told, end = b"", False, time.monotonic() + 300
    while time.monotonic() < end:
        if select.select([ours], [], [], 1.0)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux's end of a terminal
                break
            raw += part
        if until is not None and not is_told and until in raw:
            is_told = True
            process.send_signal(then)
        if process.poll() is not None and not select.select([ours], [], [], 0.2)[0]:
            break
    os.close(ours)
    process.kill()
    return Seen(process.wait(), raw)
