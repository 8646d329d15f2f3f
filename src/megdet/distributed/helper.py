"""Runs a function in a process beside this one and returns its answer or its error.

    helper = start_helper(function, argument, folder=folder, device=device)
    ...                           # this process goes on
    if helper.wait(seconds=1.0):
        answer = helper.answer()

A helper is `python -m megdet.distributed.helper FOLDER`, which finds its task in that folder and leaves its answer
there. It does not outlive the process that started it: `stop` ends it, and it ends itself if that process is killed.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from megdet.distributed.termination import STOP_SIGNALS, blocked_signals
from megdet.errors import InputError
from megdet.files import replace_file
from megdet.program import UNUSED, end, loading

if TYPE_CHECKING:
    import torch

TASK, ANSWER = "task.pickle", "answer.pickle"
_PARENT_SECONDS = 0.5
"""Seconds between two checks by a helper that the process that started it is still alive."""
_LOOK_SECONDS = 0.05
T = TypeVar("T")


class HelperError(RuntimeError):
    """A helper's function raised an exception other than InputError; the helper has printed the traceback."""


class HelperEndedError(HelperError):
    """A helper ended without an answer; the message says how."""


@dataclass(frozen=True)
class _Task:
    """The task of a helper."""

    parent: int
    """the process that started the helper"""
    path: list[str]
    """`sys.path` of that process"""
    threads: int
    niceness: int
    call: bytes
    """the function and its arguments, pickled apart: they can only be read after `path` is set"""


@dataclass(frozen=True)
class Helper(Generic[T]):
    """A process that was started by `start_helper`."""

    folder: Path
    process: subprocess.Popen[bytes]

    def wait(self, seconds: float = 0.0) -> bool:
        """Wait at most so long for the helper to end; returns whether it has ended."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def answer(self) -> T:
        """Wait for the helper to end; returns what its function returned.

        Raises:
            InputError: its function raised it.
            HelperError: its function raised anything else.
            HelperEndedError: it was killed, or ended without an answer.
        """
        code = self.process.wait()
        file = self.folder / ANSWER
        if not file.exists():
            hint = "(out of memory?)" if code < 0 else "and said no more than the lines above"
            raise HelperEndedError(f"its process {how_it_ended(code)} {hint}")
        kind, found = pickle.loads(file.read_bytes())
        if kind == "refused":
            raise found
        if kind == "failed":
            raise HelperError(found)
        answer: T = found
        return answer

    def stop(self) -> None:
        """End the helper and the processes that it has started, if it is still running."""
        if self.process.poll() is None:
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()


def start_helper(
    function: Callable[..., T],
    *arguments: Any,
    folder: Path,
    device: "torch.device",
    threads: int = 0,
    niceness: int = 0,
) -> Helper[T]:
    """Start `function(*arguments)` in a process of its own, in which `start_world(device.type)` is alone on the device.

    Args:
        function: defined at the top of a module, so that it can be pickled.
        arguments: pickled, as is the return value.
        folder: an empty folder for this helper alone; the caller deletes it.
        device: the device of the helper's world.
        threads: torch threads; 0 = torch's default.
        niceness: added to the niceness of this process, so that the helper yields the cores to others.

    Raises:
        OSError: the process cannot be started, or the folder cannot be written.
    """
    call = pickle.dumps((function, arguments))
    task = _Task(os.getpid(), list(sys.path), threads, niceness, call)
    (folder / TASK).write_bytes(pickle.dumps(task))
    # with the current folder on its path, an interpreter could import a file of the user by mistake
    has_folder = "" in sys.path or str(Path.cwd()) in sys.path
    place = {"RANK": "0", "LOCAL_RANK": str(device.index or 0), "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with blocked_signals():
        process = subprocess.Popen(
            [sys.executable, *([] if has_folder else ["-P"]), "-m", __name__, str(folder)],
            env={**os.environ, **place},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C goes to this process only, which then ends its helpers
        )
    return Helper(folder, process)


def answers_of(helpers: Sequence[Helper[T]]) -> list[T]:
    """The answers of helpers that work together, in their order; the first that fails stops the others.

    All helpers have ended afterwards, also if this process is interrupted. Raises as `Helper.answer` does.
    """
    running = list(helpers)
    try:
        while running:
            for helper in [helper for helper in running if helper.wait(_LOOK_SECONDS)]:
                helper.answer()
                running.remove(helper)
    finally:
        for helper in helpers:
            helper.stop()
    return [helper.answer() for helper in helpers]


def how_it_ended(code: int) -> str:
    """What an exit code says about a process, such as `was ended by SIGKILL`."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end_with(parent: int) -> None:
    """End this process and the processes it has started as soon as its parent is gone."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _answer(call: bytes) -> bytes:
    """The pickled answer of a call, or the line that says why there is none."""
    try:
        with loading(UNUSED):
            function, arguments = pickle.loads(call)
        return pickle.dumps(("answer", function(*arguments)))
    except InputError as error:
        return pickle.dumps(("refused", error))
    except Exception as error:
        traceback.print_exc()  # a bug of ours; the process that waits gets one line
        return pickle.dumps(("failed", f"{type(error).__name__}: {' '.join(str(error).split())}"))


def main(folder: Path) -> None:
    """Do the task of the folder and leave the answer there."""
    task: _Task = pickle.loads((folder / TASK).read_bytes())
    if os.name == "posix":
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to every process of a run
        # before torch is loaded, which takes seconds
        threading.Thread(target=_end_with, args=(task.parent,), daemon=True).start()
        os.nice(task.niceness)
    sys.path[:] = task.path
    if task.threads:
        import torch

        torch.set_num_threads(task.threads)
    replace_file(folder / ANSWER, _answer(task.call), durable=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end(0)
