"""The one exception for what a user can mend; everything else that is raised is a bug of ours."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Something outside the program is wrong: a recipe, a file, a folder, a layout.

    The message is one line that says what is wrong, where (file, key, image id) and how to mend it. The command line
    prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class DivergedError(InputError):
    """A training whose loss or gradient is no finite number any more; the rates of a sweep are allowed to do that."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The hint `; did you mean 'x'?` for the choice most like `word`, or an empty string if none is close."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""
