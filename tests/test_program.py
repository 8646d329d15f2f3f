"""How a process of ours loads what it needs, and how it ends."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megdet.program import load_function, loading

ENDING = """
import atexit, ctypes, sys, threading, time
import multiprocessing.util
from megdet.program import end

class Freed:
    def __del__(self):
        print("freed")

def work():
    time.sleep(0.2)
    print("thread")

multiprocessing.util.Finalize(None, print, ("multiprocessing",), exitpriority=0)
atexit.register(print, "atexit")
kept = Freed()
threading.Thread(target=work).start()
"""


def ended(program: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a program in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", ENDING + program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_the_end_comes_after_threads_and_exit_functions_and_frees_nothing() -> None:
    assert ended("end(3)") == (3, "thread\natexit\nmultiprocessing\n", "")


def test_a_program_without_a_code_ends_as_python_ends_it() -> None:
    assert ended("sys.exit(4)") == (4, "thread\natexit\nmultiprocessing\nfreed\n", "")
    code, printed, errors = ended("raise ValueError('a bug')")
    assert (code, printed) == (1, "thread\natexit\nmultiprocessing\nfreed\n")
    assert errors.endswith("ValueError: a bug\n")


@pytest.mark.skipif(sys.platform == "win32", reason="C's own buffer is only emptied where there is POSIX")
def test_what_a_library_has_printed_is_written() -> None:
    assert ended("ctypes.CDLL(None).printf(b'from C'); end(0)")[:2] == (0, "thread\natexit\nmultiprocessing\nfrom C")


def test_output_that_nobody_reads_is_said_as_python_says_it() -> None:
    code = "import os; os.close(1); end(0)"
    assert ended(code)[0] == ended(code.replace("end(0)", ""))[0] == 120


@pytest.mark.skipif(sys.platform == "win32", reason="no interrupt can be sent there")
def test_an_interrupt_at_the_end_ends_the_wait_for_a_thread_alone() -> None:
    program = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background leaves it ignored

def work_for_ever():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)

threading.Thread(target=work_for_ever).start()
end(3)
"""
    code, printed, errors = ended(program)
    assert (code, errors) == (3, "")
    assert printed.endswith("atexit\nmultiprocessing\n")


def test_the_temporary_folder_of_processes_is_removed(tmp_path: Path) -> None:
    program = """
import multiprocessing.util
multiprocessing.util.get_temp_dir()
end(0)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", "from megdet.program import end\n" + program]
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_the_collector_rests_while_something_is_loaded() -> None:
    assert gc.isenabled()
    with loading():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), loading():
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_the_program_has_switched_off_stays_off() -> None:
    gc.disable()
    try:
        with loading():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_package_without_use_is_kept_out_only_while_something_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package_without_use.py").touch()
    (tmp_path / "package_in_use.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    import package_in_use

    names = ("package_without_use", "package_in_use")
    with loading(names):
        with pytest.raises(ImportError):
            import package_without_use
        assert sys.modules["package_in_use"] is package_in_use
    import package_without_use

    assert {sys.modules.pop(name) for name in names} == {package_without_use, package_in_use}


def test_a_function_is_loaded_by_its_place() -> None:
    assert load_function("json:loads")("[1]") == [1]
