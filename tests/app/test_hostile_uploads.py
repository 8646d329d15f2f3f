"""Damaged images by the hundred: each is answered, none stops the server."""

import http.client
import io
import json
import random
import time
from urllib.parse import urlsplit

import pytest
from PIL import Image

from mutants import mutants_of_text

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def uploads(content: bytes, number: int) -> list[bytes]:
    """Copies of an image in several formats, each damaged; and bytes that never were one."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    found: list[bytes] = []
    for seed, kind in enumerate(FORMATS):
        file = io.BytesIO()
        image.save(file, kind)
        found += mutants_of_text(file.getvalue(), number // len(FORMATS), seed)
    draw = random.Random(0)
    return [*found, *(draw.randbytes(draw.randrange(200)) for _ in range(number - len(found)))]


def answers(server, number: int) -> dict[int, int]:
    """How often each status was answered."""
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=120)
    counts: dict[int, int] = {}
    for content in uploads(server.image.read_bytes(), number):
        connection.request("POST", "/api/detect", content, {"Content-Type": "image/jpeg"})
        answer = connection.getresponse()
        body = json.loads(answer.read())
        assert answer.status == 200 or (list(body) == ["error"] and "\n" not in body["error"]), body
        counts[answer.status] = counts.get(answer.status, 0) + 1
    for _ in range(600):  # the place of the last is given back after its answer
        connection.request("GET", "/api/health")
        if not (waiting := json.loads(connection.getresponse().read())["waiting"]):
            break
        time.sleep(0.1)
    assert waiting == 0
    connection.close()
    assert server.process.poll() is None
    return counts


def test_bad_uploads_are_refused_or_read(real_server):
    counts = answers(real_server, 60)
    assert set(counts) <= {200, 400, 413}
    assert counts[400] > 10


@pytest.mark.slow
def test_a_thousand_bad_uploads_are_refused_or_read(real_server):
    counts = answers(real_server, 1000)
    print(counts)
    assert set(counts) <= {200, 400, 413}
    assert sum(counts.values()) == 1000
    assert counts[400] > 300
