"""Sound documents with a few faults at places of their structure, as strategies of hypothesis."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from fuzzing import FORGED

_DEEP = "@deep@"
_NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(0.5, -0.5, 1.5, 1e-300, 5e-324, 1e30, -1e30, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
]
_TEXTS = [
    *("", "0", "1", "1e3", "NaN", "null", "a", "x" * 300, "\u732b", "e\u0301", "\U0001f600", " ", "."),
    *("\x1b[2J\x1b]0;t\x07", "\u202e", "\u2028", "\x00", "\x7f", "\x9b31m", "\ud800", f"a\n{FORGED}", f"\r{FORGED}"),
    *("../../etc/passwd", "/etc/passwd", "/dev/zero", "..", "C:\\x", "~/x", "a/../b.jpg", "images", "[bold]x[/bold]"),
]
STRANGE: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(_NUMBERS),
    st.sampled_from(_TEXTS),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([None, True, False, [], {}, [[]], [None], {"a": {}}, [0] * 1000, _DEEP]),
    st.recursive(st.none() | st.integers(-3, 300) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)),
)
"""Values that a careless or malicious program writes where another is expected."""


@st.composite
def broken_value(draw: st.DrawFn, value: Any, strange: st.SearchStrategy[Any] = STRANGE) -> Any:
    """A copy of a value of JSON with up to four faults: other values, missing, doubled, exchanged and nested ones."""
    root = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(0, 4))):
        places = list(_places(root))
        parent, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(("value", "value", "value", "drop", "double", "swap", "wrap", "more")))
        if kind == "drop" and parent is not root:
            del parent[key]
        elif kind == "double" and isinstance(parent, list) and parent is not root:
            parent.extend(copy.deepcopy([parent[key]] * draw(st.integers(1, 3))))
        elif kind == "swap":
            other, place = places[draw(st.integers(0, len(places) - 1))]
            if other is not root:
                parent[key] = copy.deepcopy(other[place])
        elif kind == "wrap":
            parent[key] = draw(st.sampled_from(([parent[key]], {"a": parent[key]})))
        elif kind == "more" and isinstance(parent, dict):
            parent[draw(st.sampled_from(_TEXTS))] = copy.deepcopy(draw(strange))
        else:
            parent[key] = copy.deepcopy(draw(strange))
    return root[0]


@st.composite
def broken_json(draw: st.DrawFn, value: Any, strange: st.SearchStrategy[Any] = STRANGE) -> bytes:
    """The text of a `broken_value`, now and then cut off, in another encoding, nested without end or with a key twice.

    NaN and infinite numbers are written as Python does it, or as numbers that are too large.
    """
    text = json.dumps(draw(broken_value(value, strange)), ensure_ascii=draw(st.booleans()))
    depth = draw(st.sampled_from((65, 5000, 200_000)))
    text = text.replace(f'"{_DEEP}"', draw(st.sampled_from(("[" * depth + "]" * depth, "[" * depth, '{"a":' * depth))))
    kind = draw(st.integers(0, 19))
    if kind == 0:
        text = text[: draw(st.integers(0, len(text)))]
    elif kind == 1:
        text = text.replace("{", '{"id":1,"id":2,', 1)
    elif kind == 2:
        text = text.replace("Infinity", "1e999").replace("NaN", "-1e999")
    elif kind == 3:
        return b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass")
    elif kind == 4:
        return text.encode(draw(st.sampled_from(("utf-16", "utf-32", "utf-7"))), "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


@st.composite
def broken_bytes(draw: st.DrawFn, content: bytes, reach: int = 1 << 30) -> bytes:
    """A copy with up to four faults: bytes and numbers exchanged within `reach`, parts cut out, doubled, cut off."""
    found = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, min(reach, len(found))))
        kind = draw(st.sampled_from(("number", "number", "byte", "cut", "double", "end", "words")))
        if kind == "number":
            size, order = draw(st.sampled_from((1, 2, 4, 8))), draw(st.sampled_from(("little", "big")))
            number = draw(st.sampled_from((0, 1, -1, 2**31, 2**30, 65535, 100_000, 255))) % (1 << 8 * size)
            found[start : start + size] = number.to_bytes(size, order)  # type: ignore[arg-type]  # one of two words, which hypothesis gives as any str
        elif kind == "byte":
            found[start : start + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "cut":
            del found[start : start + draw(st.integers(1, 40))]
        elif kind == "double":
            found[start:start] = found[start : start + draw(st.integers(1, 64))] * draw(st.sampled_from((1, 3, 200)))
        elif kind == "words":
            found[start:start] = draw(st.binary(max_size=16))
        else:
            del found[start:]
    return bytes(found)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value.keys() if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
