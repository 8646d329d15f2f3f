"""`megdet` in ranks of its own, without torchrun's agent, one of which may be made to fail."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from megdet.cli.main import main
from megdet.errors import InputError
from megdet.training import run as run_module


@dataclass(frozen=True)
class Sabotage:
    """One rank fails in its second step: by `input_error`, `bug`, `kill`, `told`, `freeze` or `hang`.

    With `told_early` it is told before the first.
    """

    how: str
    rank: int


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    code: int
    errors: str
    seconds: float
    """after the failure, or after the start where nobody failed on purpose"""

    @property
    def line(self) -> str:
        """The one line of megdet on standard error, without a traceback."""
        lines = [line for line in self.errors.splitlines() if line.startswith("megdet")]
        assert len(lines) == 1, self.errors
        assert "Traceback" not in self.errors
        return lines[0]


def run_ranks(
    words: Sequence[object], size: int, folder: Path, sabotage: Sabotage | None = None, limit: float = 180.0
) -> list[Ended]:
    """Run a command of megdet in every rank of a world of processes; fails when one of them hangs."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("forkserver")
    context.set_forkserver_preload(["megdet.cli.training"])  # what the server has loaded no rank loads again
    arguments = ([str(word) for word in words], size, port, folder, sabotage)
    processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(size)]
    started = time.time()
    ends: dict[int, float] = {}
    for process in processes:
        process.start()
    try:
        while len(ends) < size:
            running = {process.sentinel: rank for rank, process in enumerate(processes) if rank not in ends}
            for sentinel in wait(list(running), started + limit - time.time()):
                ends[running[sentinel]] = time.time()  # type: ignore[index]
            hang = [rank for rank in range(size) if rank not in ends]
            assert not hang or time.time() < started + limit, f"ranks {hang} hang"
            if sabotage is not None and sabotage.how == "freeze" and set(hang) == {sabotage.rank}:
                processes[sabotage.rank].kill()
    finally:
        for process in processes:
            process.kill()
            process.join()
    failed = folder / "failed_at"
    since = float(failed.read_text()) if failed.exists() else started
    return [
        Ended(process.exitcode or 0, (folder / f"stderr{rank}").read_text(), ends[rank] - since)
        for rank, process in enumerate(processes)
    ]


def _rank(rank: int, words: list[str], size: int, port: int, folder: Path, sabotage: Sabotage | None) -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    if sabotage is not None and sabotage.rank == rank:
        break_step(sabotage.how, folder)
    sys.exit(main(words))


def break_step(how: str, folder: Path) -> None:
    """Let this process fail in its second step, and note when."""
    step = run_module.train_step
    if how == "told_early":
        make = run_module.make_trainer

        def told(*arguments: Any, **options: Any) -> Any:
            (folder / "failed_at").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            return make(*arguments, **options)

        run_module.make_trainer = told
        return

    def broken_step(*arguments: Any) -> Any:
        if arguments[4] == 1:
            (folder / "failed_at").write_text(str(time.time()))
            fail(how)
        return step(*arguments)

    run_module.train_step = broken_step  # type: ignore[assignment]  # this process is for one test


def run_torchrun(
    words: Sequence[object], size: int, folder: Path, sabotage: Sabotage | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of megdet under torchrun, with a rank that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "launch.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from rank_runs import break_step
from megdet.cli.main import run
if os.environ["RANK"] == {str(sabotage.rank if sabotage else "none")!r}:
    break_step({sabotage.how if sabotage else ""!r}, Path({str(folder)!r}))
sys.argv = {["megdet", *map(str, words)]!r}
run()
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.run(
        [*torchrun, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def fail(how: str) -> None:
    match how:
        case "input_error":
            raise InputError("picture.jpg: truncated")
        case "bug":
            raise ValueError("an index is off by one")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "told":  # as by a batch system
            os.kill(os.getpid(), signal.SIGTERM)
        case "freeze":  # as a machine that is suspended
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(300)
