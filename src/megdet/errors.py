"""Exceptions: `InputError` for what a user can mend, `StoppedError` for a signal; any other exception is a bug of ours.

A message may quote text of any file, so every message is made printable and short here.
"""

import difflib
import json
import reprlib
from collections.abc import Iterable
from functools import cache

LONGEST_MESSAGE = 599
"""Characters of a message at most."""
_LONGEST_WORD = 200  # a path, a name, a number
_LONGEST_LAST_WORDS = 180  # the end of a message says how to mend it
_JOINERS = "\u200c\u200d"  # Persian and emoji need them, and they do not reorder text


class InputError(Exception):
    """Something outside the program is wrong: a recipe, a file, a folder, a layout.

    The message is one line that says what is wrong, where (file, key, image id) and how to mend it: printable, and of
    at most `LONGEST_MESSAGE` characters. The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_short(printable(" ".join(message.split()))))


class TooLittleMemoryError(InputError):
    """Memory does not suffice for what was asked for."""


class DivergedError(InputError):
    """The loss or gradient of a training is no longer finite; a sweep records this as a result and goes on.

    Args:
        message: one line, as of every InputError.
        step: the step that failed, from 1; 0 if not known.
        why: the reason, such as `gradient_norm is not finite`.
    """

    def __init__(self, message: str, step: int = 0, why: str = "") -> None:
        super().__init__(message)
        self.step, self.why = step, why


class StoppedError(KeyboardInterrupt):
    """A signal stopped the program in order. The command line prints the message and exits with `code`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.5) -> str:
    """The hint `; did you mean 'x'?` for the choice most like `word`, or an empty string if none is close.

    `cutoff` is the likeness that counts as close, from 0 to 1.
    """
    found = difflib.get_close_matches(word[:_LONGEST_WORD], list(choices), n=1, cutoff=cutoff)
    return f"; did you mean '{found[0]}'?" if found else ""


def printable(text: str) -> str:
    """The text, with characters that could mislead a terminal or a reader written as in JSON: `\\u001b`, `\\u202e`.

    These are control characters (escape sequences, line breaks), marks that change the direction of writing, invisible
    characters, and bytes of a file name that are not UTF-8. Letters of every script stay.
    """
    if text.isprintable():
        return text
    return "".join(_printable_character(character) for character in text)


def shown(value: object) -> str:
    """A value from a file, for a message: its repr, cut to a few levels, entries and characters."""
    return _Short().repr(value)


@cache
def _printable_character(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    if character.isspace() and not character.isascii() and character not in "\x85\u2028\u2029":
        return " "  # spaces of other widths, such as that of Chinese and Japanese
    return json.dumps(character)[1:-1].replace("\x7f", "\\u007f")


def _short(message: str) -> str:
    """At most `LONGEST_MESSAGE` characters: first the longest words are cut in their middle, then the message."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    message = " ".join(_cut(word, _LONGEST_WORD, _LONGEST_WORD // 2) for word in message.split())
    return _cut(message, LONGEST_MESSAGE, _LONGEST_LAST_WORDS)


def _cut(text: str, length: int, last: int) -> str:
    mark = " ... "
    return text if len(text) <= length else text[: length - last - len(mark)] + mark + text[-last:]


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 6, 6, 6
        self.maxstring, self.maxlong, self.maxother = 60, 30, 60

    def repr_int(self, x: int, level: int) -> str:
        if abs(x) >= 10**self.maxlong:
            return f"an integer of {x.bit_length()} bits"  # Python refuses to write thousands of digits
        return super().repr_int(x, level)
