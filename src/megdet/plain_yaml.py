"""Reads and writes plain YAML: strings, numbers, lists and mappings, in the core schema of YAML 1.2.

The rest of YAML is refused with its line, because it is not needed here and is dangerous or surprising: anchors and
aliases (a few bytes become gigabytes, or a list contains itself), tags (`!!timestamp`), a second document, a key given
twice. Dates, `yes` and `no` are strings, `1e-3` is a number.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from megdet.errors import InputError

_MOST_CHARACTERS = 1 << 20
_DEEPEST = 32

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_NUMBER = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def parse_yaml(text: str, source: str) -> Any:
    """The dicts (with string keys), lists, strings, numbers, booleans and None of a YAML text; None if it is empty.

    Raises InputError with `source` and the line for text that is not YAML, or uses more than the plain part of it.
    """
    if len(text) > _MOST_CHARACTERS:
        raise InputError(
            f"{source}: {len(text)} characters of YAML, more than {_MOST_CHARACTERS}; is it the right file?"
        )
    events = yaml.parse(text, yaml.SafeLoader)
    try:
        next(events)  # start of the stream
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        value = _value(events, next(events), 0)
        next(events)  # end of the document
        following = next(events)
        if isinstance(following, yaml.DocumentStartEvent):
            raise _FaultError("a second document starts", following)
        return value
    except _FaultError as fault:
        raise InputError(f"{source}: {fault}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {error}") from None


def dump_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads as an equal value; tuples become lists."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


class _FaultError(Exception):
    def __init__(self, what: str, event: yaml.Event) -> None:
        mark = event.start_mark
        assert mark is not None, "events of a text have a place"
        super().__init__(f"line {mark.line + 1}, column {mark.column + 1}: {what}")


def _value(events: Iterator[Any], event: Any, depth: int) -> Any:
    """The value that begins with this event."""
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise _FaultError("anchors and aliases (&name, *name) are not read: write the value out; quote a text", event)
    if event.tag is not None:
        raise _FaultError(f"a tag such as {event.tag[:40]} is not read: write the plain value", event)
    if isinstance(event, yaml.ScalarEvent):
        return _plain(event) if event.implicit[0] else event.value
    if depth == _DEEPEST:
        raise _FaultError(f"nested more than {_DEEPEST} deep", event)
    if isinstance(event, yaml.SequenceStartEvent):
        return _sequence(events, depth)
    return _mapping(events, depth)


def _sequence(events: Iterator[Any], depth: int) -> list[Any]:
    found: list[Any] = []
    while not isinstance(inner := next(events), yaml.SequenceEndEvent):
        found.append(_value(events, inner, depth + 1))
    return found


def _mapping(events: Iterator[Any], depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while not isinstance(key := next(events), yaml.MappingEndEvent):
        if not isinstance(key, yaml.ScalarEvent) or key.anchor is not None or key.tag is not None:
            raise _FaultError("a key must be a plain text", key)
        if key.value in found:
            raise _FaultError(f"key '{key.value}' is given twice", key)
        found[key.value] = _value(events, next(events), depth + 1)
    return found


def _plain(event: yaml.ScalarEvent) -> Any:
    """The number, boolean or None that an unquoted word means, or the word as a string."""
    word = event.value
    if word in _WORDS:
        return _WORDS[word]
    if _INTEGER.fullmatch(word):
        try:
            return int(word, 0 if word[1:2] in ("o", "x") else 10)
        except ValueError as error:  # thousands of digits
            raise _FaultError(f"a number of {len(word)} digits", event) from error
    if _NUMBER.fullmatch(word):
        return float(word.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return word


class _Dumper(yaml.SafeDumper):
    """Quotes strings that YAML 1.1 or 1.2 would read as something else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_NUMBER.pattern})$"), list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"(?:{_INTEGER.pattern})$"), list("-+0123456789"))
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
