"""SIGTERM in real processes: heard by a thread, and left alone where it is not ours."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from megdet.distributed.termination import STOP_SIGNALS, TerminationListener
from megdet.errors import StoppedError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no such signals here")


def ends_with(script: str) -> tuple[int, str]:
    """Exit code and output of a program."""
    start = "import os, signal, threading, time\nfrom megdet.distributed.termination import *\n"
    start += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background ignores it
    done = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def test_a_thread_hears_it_while_the_main_thread_waits_in_c() -> None:
    code, said = ends_with("""
        import ctypes
        def listen():
            listener.wait(60.0)
            print(listener.is_told_to_end, flush=True)
            os._exit(7)
        with TerminationListener() as listener:
            threading.Thread(target=listen).start()
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            lock = ctypes.CDLL(None).sem_wait  # without a moment for Python
            semaphore = ctypes.create_string_buffer(32)
            ctypes.CDLL(None).sem_init(semaphore, 0, 0)
            while True:
                lock(semaphore)
    """)
    assert (code, said) == (7, "True\n")


def test_one_that_nobody_heeded_ends_the_process_afterwards() -> None:
    code, said = ends_with("""
        with TerminationListener():
            os.kill(os.getpid(), signal.SIGTERM)
            print("goes on", flush=True)
        print("never")
    """)
    assert (code, said) == (-signal.SIGTERM, "goes on\n")


def test_a_forked_child_is_ended_by_its_own_and_the_parent_hears_nothing() -> None:
    code, said = ends_with("""
        with TerminationListener() as listener:
            ready, is_ready = os.pipe()
            child = os.fork()
            if not child:
                os.write(is_ready, b"x")
                time.sleep(60)
                os._exit(0)
            os.read(ready, 1)
            os.kill(child, signal.SIGTERM)
            print(os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM)
            listener.wait(0.0)
            print(listener.is_told_to_end)
    """)
    assert (code, said) == (0, "True\nFalse\n")


def test_a_ring_wakes_and_tells_nothing() -> None:
    with TerminationListener() as listener:
        threading.Timer(0.1, listener.ring).start()
        listener.wait(60.0)
        assert not listener.is_told_to_end
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


def test_the_second_interrupt_ends_a_process_that_heeds_the_first() -> None:
    code, said = ends_with("""
        with TerminationListener(STOP_SIGNALS, raises=True) as listener, listener.heeded():
            os.kill(os.getpid(), signal.SIGINT)
            print(listener.asked == [signal.SIGINT], flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("never")
    """)
    assert (code, said) == (-signal.SIGINT, "True\n")


def test_a_signal_waits_while_it_is_heeded_and_is_raised_where_it_is_not() -> None:
    def wait_and_look() -> None:
        with TerminationListener(STOP_SIGNALS, raises=True) as listener, listener.heeded():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert listener.asked == [signal.SIGUSR1]
            with listener.heeded(False):
                raise AssertionError("it has not waited")

    with pytest.raises(StoppedError, match="stopped by SIGUSR1; the same command goes on") as stopped:
        wait_and_look()
    assert stopped.value.code == 75
    with pytest.raises(StoppedError) as stopped, TerminationListener(STOP_SIGNALS, raises=True):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_process_of_a_group_is_ended_by_its_parent_and_not_by_others() -> None:
    code, said = ends_with("""
        from megdet.distributed.termination import blocked_signals, end_by_parent_only
        with blocked_signals():
            child = os.fork()
            if not child:
                end_by_parent_only()
                time.sleep(60)
                os._exit(1)
        for name in ("TERM", "USR1", "INT"):
            os.system(f"kill -{name} {child}")
        time.sleep(0.5)
        print(os.waitpid(child, os.WNOHANG))
        os.kill(child, signal.SIGTERM)
        print(os.waitpid(child, 0)[1])
    """)
    assert (code, said) == (0, "(0, 0)\n0\n")


def test_a_program_that_handles_it_keeps_its_handler() -> None:
    def own(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        with TerminationListener():
            assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
