"""SIGTERM, received by a thread of this process even while its main thread waits in a collective.

Python runs a signal handler in the main thread, and only after that returns from C++. But the signal writes a byte into
a pipe at once (`signal.set_wakeup_fd`), and any thread can wait for that.
"""

import os
import select
import signal
import threading
import weakref
from types import FrameType

_RUNG = b"\0"
_listening: "weakref.WeakSet[TerminationListener]" = weakref.WeakSet()


class TerminationListener:
    """While it is entered, SIGTERM does not end this process: the thread that waits here must do it.

    It changes nothing outside the main thread, on systems without such signals, and if the program has a handler of its
    own.
    """

    def __init__(self) -> None:
        self.is_told_to_end = False
        self._is_handling = False
        self._read, self._write = os.pipe()

    def __enter__(self) -> "TerminationListener":
        is_main = threading.current_thread() is threading.main_thread()
        if os.name == "posix" and is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            os.set_blocking(self._write, False)
            signal.signal(signal.SIGTERM, _go_on)
            self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._is_handling = True
            _listening.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        self.wait(0.0)
        if self.is_told_to_end and kind is None:
            os.kill(os.getpid(), signal.SIGTERM)  # no thread has ended the process
        os.close(self._read)
        os.close(self._write)

    def stop(self) -> None:
        """Make SIGTERM end this process again."""
        if self._is_handling:
            self._is_handling = False
            signal.set_wakeup_fd(self._wakeup_before)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def wait(self, seconds: float) -> None:
        """Wait so long, or until SIGTERM arrives or `ring` is called."""
        if select.select([self._read], [], [], seconds)[0] and signal.SIGTERM in os.read(self._read, 256):
            self.is_told_to_end = True

    def ring(self) -> None:
        """Wake the thread that waits."""
        os.write(self._write, _RUNG)


def _go_on(_number: int, _frame: FrameType | None) -> None:
    """Nothing to do in the main thread: the byte in the pipe is enough."""


def _stop_in_child() -> None:
    for listener in list(_listening):
        listener.stop()


if hasattr(os, "register_at_fork"):
    # SIGTERM must end a loading process, which must not write into the inherited pipe
    os.register_at_fork(after_in_child=_stop_in_child)
