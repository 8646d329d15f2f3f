"""Runs the command with which a user would start a run."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megdet.contract.chaos.processes import MARK, Target, end_all, processes_of, targets_of

ORPHAN_SECONDS = 5.0
"""Seconds after a command's end within which its last process must have ended."""
_PACKAGE = str(Path(__file__).parents[2])
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n((?:.*?[ |]{2}.*\n)+)")


def command_line(words: Sequence[str], devices: int) -> list[str]:
    """`megdet WORDS` in one process, or under torchrun in several."""
    if devices == 1:
        return [sys.executable, "-m", "megdet", *words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
    return [*launcher, "-m", "megdet", "--", *words]


class Command:
    """A running command; `close` ends all its processes.

    Args:
        words: the words after `megdet`.
        devices: number of ranks.
        mark: set in the environment of all its processes.
        log: the file for its output.
    """

    def __init__(self, words: Sequence[str], devices: int, mark: str, log: Path) -> None:
        self.devices, self.mark, self.log = devices, mark, log
        self.started = time.monotonic()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command_line(words, devices),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, MARK: mark},
                start_new_session=True,  # Ctrl-C goes to this process only, which then ends the command
            )

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.poll()

    def targets(self) -> list[Target]:
        """Its processes that may be disturbed."""
        return targets_of(self.mark, self._process.pid)

    def orphans(self) -> list[str]:
        """The command lines of the processes that are left after ORPHAN_SECONDS."""
        end = time.monotonic() + ORPHAN_SECONDS
        while (left := processes_of(self.mark)) and time.monotonic() < end:
            time.sleep(0.02)
        return [" ".join(process.words)[:120] for process in left]

    def last_line(self) -> str:
        """The last line of its output, a line of megdet if there is one."""
        lines = [line for line in self.output().splitlines() if line.strip()]
        ours = [line for line in lines if line.startswith(("megdet:", "megdet (rank"))]
        return (ours or lines or ["it said nothing"])[-1]

    def output(self) -> str:
        """All its output."""
        return self.log.read_text(errors="replace")

    def traceback(self) -> str:
        """The last line of a traceback with a frame of megdet, which means a bug; else empty."""
        text = self.output()
        for found in _TRACEBACK.finditer(text):
            if _PACKAGE in found[1]:
                return text[found.end() :].partition("\n")[0] or "a traceback"
        return ""

    def close(self) -> None:
        """Kill all processes that are left."""
        end_all(self.mark)
        self._process.wait()
