"""A web server of a folder that fails on purpose, and archives of a folder."""

import re
import socket
import struct
import tarfile
import threading
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

Fault = int | str
"""A status, or `reset` (in the middle of the body), `short` (the body ends early) or `slow` (no answer in time)."""


class Asked(NamedTuple):
    """A request that arrived."""

    name: str
    range: str


def every_sound(_: int) -> Fault | None:
    """No request has a fault."""
    return None


@dataclass
class FarServer:
    """What a test says the server does, and what it was asked."""

    folder: Path
    address: str = ""
    fault_of: Callable[[int], Fault | None] = every_sound
    """the fault of a request by its number from 0; None is a sound answer"""
    has_ranges: bool = True
    slow_seconds: float = 3.0
    asked: list[Asked] = field(default_factory=list)
    is_stopped: threading.Event = field(default_factory=threading.Event)

    def asked_for(self, name: str) -> list[Asked]:
        return [own for own in self.asked if own.name == name]


@contextmanager
def far_server(folder: Path) -> Iterator[FarServer]:
    """A server of the files of a folder and of those below it, on a free port of this machine."""
    server = FarServer(folder)
    numbers = count()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
            server.asked.append(Asked(name, self.headers.get("Range", "")))
            fault = server.fault_of(next(numbers))
            if fault == "slow":
                server.is_stopped.wait(server.slow_seconds)
            file = folder / name
            if isinstance(fault, int) or not file.is_file():
                self.answer(fault if isinstance(fault, int) else 404, b"no", {})
                return
            content, status, headers = file.read_bytes(), 200, {}
            if server.has_ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
                first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
            self.answer(status, content, headers, fault)

        def do_HEAD(self) -> None:
            self.do_GET()

        def answer(self, status: int, content: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(content[: len(content) // 2] if fault in ("reset", "short") else content)
            self.wfile.flush()
            if fault in ("reset", "short"):
                if fault == "reset":  # the connection is reset, not closed
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True

        def log_message(self, *words: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *words: Any) -> None:
            pass  # clients that gave up

    with Server(("127.0.0.1", 0), Handler) as http:
        server.address = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.is_stopped.set()
            http.shutdown()
            thread.join()


def zip_of(folder: Path, archive: Path, inside: str = "") -> str:
    """Writes a zip of a folder's files; returns the address of the folder `inside` it."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, Path(inside) / path.relative_to(folder))
    return f"zip://{inside}::{archive}"


def tar_of(folder: Path, archive: Path, inside: str = "") -> str:
    """Writes a tar of a folder's files; returns the address of the folder `inside` it."""
    with tarfile.open(archive, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.add(path, str(Path(inside) / path.relative_to(folder)))
    return f"tar://{inside}::{archive}"


def every(n: int, fault: Fault) -> Callable[[int], Fault | None]:
    """Every n-th request has this fault, the first included."""
    return lambda number: fault if number % n == 0 else None
