"""What a request brings, within limits of size and time, and the wait for its answer."""

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import HTTPException
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff")
"""Content types of images in the description of the endpoint; what a file is, its content says."""
_CLOSE = {"Connection": "close"}
_LINGER_SECONDS = 2.0
"""How long the rest of a body that is too large is read and thrown away, so that its sender gets to read why."""

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one request may take."""

    max_bytes: int = 20 << 20
    """of a body"""
    seconds: float = 30.0
    """of sending the body, and again of the wait for the answer"""


async def sent_image(request: Request, limits: Limits) -> bytes:
    """The image file of a request: its body, or the one file of a form.

    Raises HTTPException: 415 for another type, 413 and 408 for a body too large or too slow, 400 for no image.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if not (kind.startswith("image/") or kind in ("application/octet-stream", "multipart/form-data")):
        raise HTTPException(
            415, "send the image as the body with its content type, such as image/jpeg, or as a file of a form"
        )
    body = await _body(request, limits)
    content = await _file_of_form(request, body) if kind == "multipart/form-data" else body
    if not content:
        raise HTTPException(400, "no image: the body is empty")
    return content


async def _body(request: Request, limits: Limits) -> bytes:
    declared = request.headers.get("content-length", "0")
    chunks = request.stream()
    found = bytearray()
    is_too_large = declared.isdecimal() and int(declared) > limits.max_bytes
    try:
        async with asyncio.timeout(limits.seconds):
            while not is_too_large and (chunk := await anext(chunks, None)) is not None:
                found += chunk
                is_too_large = len(found) > limits.max_bytes
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {limits.seconds:g} seconds", _CLOSE) from None
    if is_too_large:
        found.clear()
        await _discard(chunks)
        raise HTTPException(413, f"the body has more than {limits.max_bytes} bytes: send a smaller image", _CLOSE)
    return bytes(found)


async def _discard(chunks: AsyncGenerator[bytes, None]) -> None:
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_LINGER_SECONDS):
            async for _ in chunks:
                pass


async def _file_of_form(request: Request, body: bytes) -> bytes:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, chunks(), max_files=1, max_fields=16)
    parser.spool_max_size = len(body) + 1  # in memory, never in a file
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"the form cannot be read: {error.message}") from None
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if not files:
        raise HTTPException(400, "no image: the form has no file")
    content = await files[0].read()
    await form.close()
    return content


async def answer_in_time(answer: Future[T], request: Request, seconds: float) -> T:
    """Wait for an answer. Whoever is gone or has waited so long is left out of the next call of the detector.

    Raises HTTPException 504 after these seconds, ClientDisconnect when the client has gone, and what the future raises.
    """
    waiting, gone = asyncio.wrap_future(answer), asyncio.ensure_future(_disconnected(request))
    either: list[asyncio.Future[Any]] = [waiting, gone]
    try:
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if gone.done():
            raise ClientDisconnect
        raise HTTPException(504, f"no answer within {seconds:g} seconds: the server has too much to do")
    finally:
        answer.cancel()  # at once: the loop would pass the other one's on after the refusal is sent
        waiting.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
