"""Damaged copies of a file, as accidents and as malice make them; the same ones for the same seed."""

import copy
import json
import random
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megdet.errors import LONGEST_MESSAGE, InputError

_WORDS = [
    *(
        "[" * 3000,
        "{" * 3000,
        "{a: " * 500,
        '{"a":' * 3000,
        "- " * 500,
        "<a>" * 3000,
        "[[[[]]]]",
        "{}",
        "[]",
        '""',
        "''",
    ),
    *("0", "-1", "1.5", "1e308", "-1e308", "1e999", "1" * 400, "1" * 5000, "0x" + "f" * 5000, "0b_", "0o8", "1_000"),
    *("NaN", "nan", ".nan", ".inf", "Infinity", "null", "~", "true", "yes", "2001-99-99", "190:20:30", "12:00", "="),
    *(
        "!!timestamp x",
        "!!binary x",
        "!!python/object:os.system {}",
        "&a [*a]",
        "*a",
        "<<: {}",
        "? [a]",
        "--- ",
        "%YAML 9",
    ),
    *(
        "\x1b[2J",
        "\u202e",
        "\u2028",
        "\x00",
        "\ufeff",
        "猫",
        "é",
        "\\ud800",
        "\\u0000",
        '"\\ud83d"',
        "x" * 300,
        "../" * 40,
    ),
    *("&lol;", "&#0;", "<![CDATA[", "<!DOCTYPE a [<!ENTITY b 'b'>]>", "<object/>", "-->", '<?xml encoding="gb2312"?>'),
    *("\n", "\t", " ", ":", ",", "#", '"', "'", "}", "]", "|", ">"),
]
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 2**31, 2**63, 2**64, 10**400, 1.5, -0.5, 1e308, -1e308, 5e-324, "", "a", "0", "1e3"),
    *(
        "\x1b[2J",
        "\u202e",
        "x" * 300,
        "猫",
        "../../x",
        "/etc/passwd",
        "\u0000",
        [],
        {},
        [[]],
        [None],
        {"a": {}},
        [0] * 1000,
    ),
]
_SECONDS = 60
_BYTES = 100 << 20


def mutants_of_text(content: bytes, number: int, seed: int = 0) -> Iterator[bytes]:
    """Copies with a few cuts, repetitions, exchanged bytes and strange words."""
    draw = random.Random(seed)
    for _ in range(number):
        mutant = content
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            mutant = _damaged(mutant, draw)
        yield mutant


def mutants_of_json(value: Any, number: int, seed: int = 0) -> Iterator[bytes]:
    """Valid JSON of the value with strange values, missing, additional and exchanged ones in one or a few places."""
    draw = random.Random(seed)
    for _ in range(number):
        root = [copy.deepcopy(value)]
        for _ in range(draw.choice((1, 1, 2))):
            parent, key = draw.choice(list(_places(root)))
            what = draw.random()
            if what < 0.7:
                parent[key] = copy.deepcopy(draw.choice(_VALUES))
            elif what < 0.85 and parent is not root:
                del parent[key]
            elif isinstance(parent, list) and parent is not root:
                parent.append(copy.deepcopy(parent[key]))
            else:
                parent[key] = [parent[key]]
        yield json.dumps(root[0]).encode()


def refused_or_read(read: Callable[[], object], *names: str) -> str:
    """Read; a refusal must be one short printable line that has one of the names. Returns it, or nothing.

    Anything else that is raised, 60 seconds or 100 MiB fail the test.
    """
    with _limited():
        try:
            read()
        except InputError as error:
            message = str(error)
        else:
            return ""
    assert len(message) <= LONGEST_MESSAGE, message
    assert message.replace("\u200c", "").replace("\u200d", "").isprintable(), message
    assert any(name in message for name in names), message
    return message


def _damaged(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    end = min(len(content), start + draw.choice((0, 1, 2, 8, 40)))
    word = draw.choice(_WORDS).encode()
    kind = draw.randrange(7)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[end:]
    if kind == 2:
        return content[:start] + content[start:end] * draw.choice((2, 100)) + content[end:]
    if kind == 3:
        return content[:start] + bytes(draw.randrange(256) for _ in range(end - start)) + content[end:]
    if kind == 4:  # a whole value
        ends = [place for place in range(start, len(content)) if content[place : place + 1] in b" \n,}]<"]
        return content[:start] + word + content[ends[0] if ends else start :]
    return content[:start] + word + content[end if kind == 5 else start :]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value.keys() if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


@contextmanager
def _limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"no answer in {_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < _BYTES, f"{peak} bytes for a small file"
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
