"""Two hosts on one machine: network namespaces with names of their own, joined by a cable that can be cut."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path


class NoNamespacesError(RuntimeError):
    """This machine makes no network namespaces for this user."""


@dataclass(frozen=True)
class Host:
    """A network namespace that a sleeping process holds."""

    holder: int
    address: str
    cable: str

    def words(self, words: Sequence[str]) -> list[str]:
        """A command that runs on this host."""
        return ["nsenter", "--target", str(self.holder), "--net", "--uts", "--", *words]

    def do(self, *words: str) -> None:
        """Run a command of the system on this host."""
        subprocess.run(self.words(words), check=True, capture_output=True)

    def cut(self) -> None:
        """Let nothing through any more, and say so to nobody."""
        self.do("ip", "link", "set", self.cable, "down")


@dataclass(frozen=True)
class Agent:
    """A torchrun on a host, with all that it has started."""

    host: Host
    process: subprocess.Popen[bytes]
    log: Path

    def kill_host(self) -> None:
        """Kill every process of the host at once, as a loss of power, but for the network's last words."""
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def pids(self) -> list[int]:
        """All processes in the namespace but its holder."""
        own = Path(f"/proc/{self.host.holder}/ns/net").readlink()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_there = (folder / "ns/net").readlink() == own
                state = (folder / "stat").read_text().rpartition(") ")[2][0]
            except OSError:
                continue
            if is_there and state not in "ZX" and int(folder.name) != self.host.holder:
                found.append(int(folder.name))
        return found

    def ranks(self) -> list[int]:
        """Those of them that torchrun has started."""
        return [pid for pid in self.pids() if b"-u\0-m\0megdet" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def lines(self) -> list[str]:
        """What megdet has said of its end."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if line.startswith(("megdet:", "megdet (rank"))]


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Raises NoNamespacesError with the system's reason."""
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if missing:
        raise NoNamespacesError(f"{missing[0]} is not installed")
    with ExitStack() as opened:
        holders = []
        for name in ("left", "right"):
            script = f"hostname {name} && echo ready && exec sleep 3600"
            holder = opened.enter_context(
                subprocess.Popen(
                    ["unshare", "--net", "--uts", "--", "sh", "-c", script],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            opened.callback(holder.kill)
            assert holder.stdout is not None
            assert holder.stderr is not None
            if holder.stdout.readline() != "ready\n":
                raise NoNamespacesError(holder.stderr.read().strip())
            holders.append(holder.pid)
        hosts = Host(holders[0], "10.213.7.1", "megdet_l"), Host(holders[1], "10.213.7.2", "megdet_r")
        cable = ["ip", "link", "add", hosts[0].cable, "netns", str(hosts[0].holder), "type", "veth"]
        cable += ["peer", "name", hosts[1].cable, "netns", str(hosts[1].holder)]
        made = subprocess.run(cable, capture_output=True, text=True, check=False)
        if made.returncode:
            raise NoNamespacesError(made.stderr.strip())
        for host in hosts:
            host.do("ip", "address", "add", f"{host.address}/24", "dev", host.cable)
            host.do("ip", "link", "set", host.cable, "up")
            host.do("ip", "link", "set", "lo", "up")
        yield hosts


def start_torchrun(host: Host, rendezvous: Host, words: Sequence[object], log: Path) -> Agent:
    """Start one rank of `megdet WORDS` on a host; with those of the other host, if it is there."""
    conf = f"is_host={int(host == rendezvous)},last_call_timeout=3,join_timeout=300"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    torchrun += ["--max-restarts", "3", "--rdzv-id", "run", "--rdzv-backend", "c10d", "--rdzv-conf", conf]
    torchrun += ["--rdzv-endpoint", f"{rendezvous.address}:29400", "--local-addr", host.address]
    command = host.words([*torchrun, "-m", "megdet", "--", *map(str, words)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host.cable}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    return Agent(host, process, log)


def wait_for(process: subprocess.Popen[bytes], seconds: float) -> float:
    """Seconds until it has ended; fails if it has not within so many."""
    started = time.monotonic()
    process.wait(seconds)
    return time.monotonic() - started
