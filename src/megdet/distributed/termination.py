"""Signals that ask this process to stop: SIGTERM, SIGUSR1 (the notice of a scheduler) and SIGINT (Ctrl-C).

Python runs a signal handler in the main thread, and only after that returns from C++. But the signal writes a byte into
a pipe at once (`signal.set_wakeup_fd`), and any thread can wait for that, while the main thread waits in a collective.
"""

import multiprocessing
import os
import select
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from megdet.errors import StoppedError

STOP_SIGNALS: tuple[int, ...] = tuple(
    int(getattr(signal, name)) for name in ("SIGUSR1", "SIGTERM", "SIGINT") if hasattr(signal, name)
)
"""The stop signals of this system; if several have arrived, the first in this order decides the exit code."""
_EXIT_CODES = {"SIGUSR1": 75, "SIGTERM": 143, "SIGINT": 130}
_RUNG = b"\0"
_listening: "weakref.WeakSet[TerminationListener]" = weakref.WeakSet()


def signal_name(number: int) -> str:
    """SIGTERM, SIGUSR1, or Ctrl-C for SIGINT."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def exit_code(number: int) -> int:
    """The exit code after a stop signal: 75 (SIGUSR1: start it again), 143 (SIGTERM) or 130 (Ctrl-C)."""
    return _EXIT_CODES[signal.Signals(number).name]


def stopped_by(number: int) -> StoppedError:
    """The exception for a signal that stops a program outside the steps of a training."""
    return StoppedError(
        f"stopped by {signal_name(number)}; the same command goes on from the last checkpoint, if there is one",
        exit_code(number),
    )


class TerminationListener:
    """Inside its `with` block, signals do not end this process: the program or a thread in `wait` handles them.

    It changes nothing outside the main thread, on systems without these signals, and for signals for which the program
    has a handler of its own.

    Args:
        signals: the signals to listen to.
        raises: raise StoppedError in the main thread, unless the signal is `heeded` there.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM,), *, raises: bool = False) -> None:
        self.signals, self.raises = signals, raises
        self.told: list[int] = []
        """the signals that `wait` has seen, in order"""
        self.asked: list[int] = []
        """the signals that the main thread has seen"""
        self.is_heeded = False
        """whether the main thread checks `asked` by itself"""
        self.is_agreed = False
        """whether all ranks have agreed to stop, so that they end in order"""
        self._before: dict[int, object] = {}
        self._read, self._write = os.pipe()

    @property
    def is_told_to_end(self) -> bool:
        """Whether `wait` has seen SIGTERM."""
        return signal.SIGTERM in self.told

    def __enter__(self) -> "TerminationListener":
        if os.name == "posix" and threading.current_thread() is threading.main_thread():
            self._before = {number: own for number in self.signals if _is_free(own := signal.getsignal(number))}
        if self._before:
            os.set_blocking(self._write, False)
            self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            for number in self._before:
                signal.signal(number, self._on_signal)
            _listening.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        self.wait(0.0)
        if self.told and kind is None:
            os.kill(os.getpid(), self.told[0])  # nobody has handled the signal
        os.close(self._read)
        os.close(self._write)

    def stop(self, *, in_child: bool = False) -> None:
        """Restore the old signal handlers, or in a child process the default ones."""
        before, self._before = self._before, {}
        if before:
            signal.set_wakeup_fd(-1 if in_child else self._wakeup_before)
        for number, handler in before.items():
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default if in_child else handler)  # type: ignore[arg-type]  # getsignal gave it

    def wait(self, seconds: float) -> None:
        """Wait for so many seconds, or until a signal arrives or `ring` is called."""
        if select.select([self._read], [], [], seconds)[0]:
            self.told += [number for number in os.read(self._read, 256) if number in self.signals]

    def ring(self) -> None:
        """Wake the thread that waits."""
        os.write(self._write, _RUNG)

    @contextmanager
    def heeded(self, heeds: bool = True) -> Iterator[None]:
        """A context in which signals wait until the main thread checks `asked`; with `heeds` False they do not.

        Raises StoppedError for a signal that is waiting when nobody checks `asked`.
        """
        before, self.is_heeded = self.is_heeded, heeds
        self._refuse_to_wait()
        try:
            yield
        finally:
            self.is_heeded = before
        self._refuse_to_wait()

    def _refuse_to_wait(self) -> None:
        if self.asked and not self.is_heeded:
            raise stopped_by(self.asked[0])

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.asked.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        if self.raises:
            self._refuse_to_wait()


@contextmanager
def blocked_signals() -> Iterator[None]:
    """A context for starting a process that must not end by a signal to the whole group: its parent ends it.

    Launchers, terminals and schedulers send signals to all processes of a run, loading processes included.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it later would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_by_parent_only() -> None:
    """In a process started under `blocked_signals`: let SIGTERM end it only if the parent has sent it."""
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=_wait_for_parent, name="megdet end_by_parent_only", daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()  # not the fork server that forked this process
    parent_id = os.getppid() if parent is None else parent.pid
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent_id:
        pass
    os._exit(0)


def _is_free(handler: object) -> bool:
    """Whether the program has no handler of its own for a signal."""
    is_default = handler in (signal.SIG_DFL, signal.default_int_handler)
    return is_default or isinstance(getattr(handler, "__self__", None), TerminationListener)


def _stop_in_child() -> None:
    for listener in list(_listening):
        listener.stop(in_child=True)


if hasattr(os, "register_at_fork"):
    # a forked process must not write into the inherited pipe
    os.register_at_fork(after_in_child=_stop_in_child)
