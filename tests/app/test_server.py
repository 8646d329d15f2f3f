"""A real server on this machine, and clients that are slow, greedy, gone or confused."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from app_servers import png, served, serving, three_objects
from megdet.api.images import Pixels
from megdet.app.requests import Limits
from megdet.app.server import bound_socket, is_loopback
from megdet.detections import Detections
from megdet.errors import InputError

_SECONDS = 60.0


def post(address: str, content: bytes, **headers: str) -> tuple[int, dict[str, str], dict[str, object]]:
    """Status, headers and content of the answer to an image."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=_SECONDS)
    connection.request("POST", "/api/detect", content, {"Content-Type": "image/png", **headers})
    answer = connection.getresponse()
    told = {name.lower(): value for name, value in answer.getheaders()}
    body = json.loads(answer.read())
    connection.close()
    return answer.status, told, body


def raw(address: str, *pieces: bytes) -> tuple[socket.socket, bytes]:
    """Bytes sent as they are, and what comes back until the server closes."""
    place = urlsplit(address)
    own = socket.create_connection((place.hostname or "", place.port or 0), timeout=_SECONDS)
    for piece in pieces:
        own.sendall(piece)
    received = b""
    while chunk := own.recv(65536):
        received += chunk
    return own, received


def head(length: object, kind: str = "Content-Length") -> bytes:
    return (
        f"POST /api/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n{kind}: {length}\r\n\r\n".encode()
    )


class Slow:
    """A detector that waits until it may go on."""

    def __init__(self) -> None:
        self.begun, self.may_go_on, self.images = threading.Event(), threading.Event(), 0

    def __call__(self, images: Sequence[Pixels]) -> list[Detections]:
        self.images += len(images)
        self.begun.set()
        assert self.may_go_on.wait(_SECONDS)
        return three_objects(images)


def wait_until(is_so) -> None:
    end = time.monotonic() + _SECONDS
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_concurrent_requests_share_calls_and_get_their_own_answers():
    slow = Slow()
    with serving(served(slow, together=16)) as (address, batcher), ThreadPoolExecutor(9) as clients:
        first = clients.submit(post, address, png(value=200))
        assert slow.begun.wait(_SECONDS)
        others = [clients.submit(post, address, png(width=41 + number)) for number in range(8)]
        wait_until(lambda: batcher.waiting == 9 and not batcher._coming)
        slow.may_go_on.set()
        assert first.result()[2]["images_together"] == 1
        assert [(own.result()[2]["width"], own.result()[2]["images_together"]) for own in others] == [
            (41 + number, 8) for number in range(8)
        ]
    assert batcher.calls == 2


def test_a_body_is_counted_while_it_streams_whatever_its_head_says():
    with serving(served(), limits=Limits(max_bytes=100_000)) as (address, _):
        status, _, body = post(address, b"x" * 100_001)
        assert (status, body["error"]) == (413, "the body has more than 100000 bytes: send a smaller image")
        chunk = b"186a0\r\n" + b"x" * 100_000 + b"\r\n"
        own, answer = raw(address, head("chunked", "Transfer-Encoding"), chunk, chunk, b"0\r\n\r\n")
        own.close()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in answer.lower()
        own, answer = raw(address, head(10**15), b"x" * 1000)  # it never comes
        own.close()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert post(address, png())[0] == 200


def test_a_body_that_does_not_come_is_given_up_and_its_place_with_it():
    with serving(served(), limits=Limits(seconds=0.5)) as (address, batcher):
        own, answer = raw(address, head(1000), b"x")
        own.close()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"did not come within 0.5 seconds" in answer
        wait_until(lambda: batcher.waiting == 0)


def test_a_head_that_does_not_end_and_silence_are_closed_but_a_long_answer_is_not():
    slow = Slow()
    with serving(served(slow), head_seconds=0.1) as (address, _), ThreadPoolExecutor(1) as clients:
        for started in (b"", b"GET / HTTP/1.1\r\nHost: loc"):
            own, answer = raw(address, started)
            own.close()
            assert answer == b""
        asked = clients.submit(post, address, png())
        assert slow.begun.wait(_SECONDS)
        time.sleep(0.5)  # as long as five looks at the connection
        slow.may_go_on.set()
        assert asked.result()[0] == 200


def test_who_waits_too_long_is_told_and_left_out():
    slow = Slow()
    with serving(served(slow), limits=Limits(seconds=0.5)) as (address, batcher):
        assert post(address, png())[0] == 504
        assert post(address, png())[0] == 504
        slow.may_go_on.set()
        wait_until(lambda: batcher.waiting == 0)
        assert post(address, png())[0] == 200
    assert slow.images == 2, "the second was left out"


def test_more_than_may_wait_are_told_to_come_again():
    slow = Slow()
    with serving(served(slow), waiting=1) as (address, _), ThreadPoolExecutor(1) as clients:
        asked = clients.submit(post, address, png())
        assert slow.begun.wait(_SECONDS)
        status, headers, body = post(address, png())
        assert (status, headers["retry-after"]) == (503, "1")
        assert body["error"] == "as many requests wait as may (1): try again"
        slow.may_go_on.set()
        assert asked.result()[0] == 200


def test_clients_that_go_away_do_not_stop_the_others_and_their_images_are_left_out():
    slow = Slow()
    with serving(served(slow)) as (address, batcher), ThreadPoolExecutor(1) as clients:
        asked = clients.submit(post, address, png())
        assert slow.begun.wait(_SECONDS)
        place = urlsplit(address).hostname or "", urlsplit(address).port or 0
        with socket.create_connection(place, timeout=_SECONDS) as half:
            half.sendall(head(len(png())) + png()[:20])
            wait_until(lambda: batcher.waiting == 2)
        wait_until(lambda: batcher.waiting == 1)
        with socket.create_connection(place, timeout=_SECONDS) as whole:
            whole.sendall(head(len(png())) + png())
            wait_until(lambda: len(batcher._jobs) == 1)
        wait_until(lambda: batcher._jobs[0].answer.cancelled())
        slow.may_go_on.set()
        assert asked.result()[0] == 200
        wait_until(lambda: batcher.waiting == 0)
    assert slow.images == 1


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00", b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000, head("-1")]
)
def test_what_is_no_request_is_refused_and_the_server_lives(sent):
    with serving(served(), head_seconds=0.2) as (address, _):
        own, answer = raw(address, sent)
        own.close()
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
        assert post(address, png())[0] == 200


def test_a_socket_knows_whether_other_machines_reach_it_and_a_taken_port_is_one_line():
    with bound_socket("127.0.0.1", 0) as own, bound_socket("0.0.0.0", 0) as open_to_all:
        assert (is_loopback(own), is_loopback(open_to_all)) == (True, False)
        own.listen()
        port = own.getsockname()[1]
        with (
            pytest.raises(InputError, match=f"port {port} of 127.0.0.1 cannot be used"),
            bound_socket("127.0.0.1", port),
        ):
            pass
    with pytest.raises(InputError, match="ports end at 65535"), bound_socket("127.0.0.1", 70000):
        pass
    with pytest.raises(InputError, match="no address of this machine"), bound_socket("no such host", 0):
        pass
