"""The server: its socket, its connections, and how it stops."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from megdet.errors import InputError

HEAD_SECONDS = 10
"""After twice as long at most, a connection on which no request has begun is closed."""
_KEEP_ALIVE_SECONDS = 2 * HEAD_SECONDS
"""Not uvicorn's 5: a client of a busy machine may pause as long, and meet a closed connection."""
_STOP_SECONDS = 10
_STOPS = (signal.SIGINT, signal.SIGTERM)


class PunctualProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose next request does not begin: uvicorn waits for half a head for ever."""

    head_seconds: float = HEAD_SECONDS
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begin to look at it now and then."""
        super().connection_made(transport)
        self._look_again(None, is_idle=False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _look_again(self, last: RequestResponseCycle | None, *, is_idle: bool) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._look, last, is_idle)

    def _look(self, last: RequestResponseCycle | None, was_idle: bool) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and was_idle and self.cycle is last:
            self.transport.close()
        else:
            self._look_again(self.cycle, is_idle=is_idle)


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._say_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._say_started()


@contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address, which does not listen yet; port 0 is a free one. Raises InputError."""
    if port > 65535:
        raise InputError(f"--port {port}: ports end at 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        own = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: no address of this machine ({error})") from None
    with own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind(address)
        except OSError as error:
            raise InputError(
                f"port {port} of {host} cannot be used ({error.strerror}); choose another with --port, 0 is a free one"
            ) from None
        yield own


def address_of(own: socket.socket) -> str:
    """The address of a socket for a browser."""
    host, port = own.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(own: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(own.getsockname()[0].partition("%")[0]).is_loopback


def make_server(app: ASGIApp, started: Callable[[], None], protocol: type[H11Protocol] = PunctualProtocol) -> _Server:
    """The server of an application; `started` is called when it listens."""
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    return _Server(config, started)


def run_until_stopped(server: uvicorn.Server, sockets: Sequence[socket.socket]) -> None:
    """Serve until SIGTERM or Ctrl-C; then no more connections are taken and what was asked is answered.

    A second Ctrl-C does not wait for that.
    """

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in _STOPS}  # uvicorn sends itself the signal again
    try:
        server.run(list(sockets))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
