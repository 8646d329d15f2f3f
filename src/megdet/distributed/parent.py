"""Lets a process end with the process that started it: a rank with torchrun, a loading process with its rank."""

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.5


def end_with_launcher() -> None:
    """If torchrun started this process, end with it: otherwise the ranks of a killed torchrun would train on."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent(parent: int | None = None) -> None:
    """Let this process be killed as soon as its parent has ended in any way.

    On Linux the kernel kills it at once, even if it is stopped or hangs; elsewhere a thread checks twice a second.
    `parent` is the process that must still be alive; by default the current parent.
    """
    expected = os.getppid() if parent is None else parent
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != expected:  # the parent ended before the kernel was told
            os.kill(os.getpid(), signal.SIGKILL)
    elif os.name == "posix":
        threading.Thread(target=_watch, args=(expected,), name="megdet end_with_parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
