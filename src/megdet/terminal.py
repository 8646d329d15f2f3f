"""Output for people: text from files cannot reach the terminal as a command or stop the program."""

import io
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from megdet.errors import printable

_WIDE = 160


class Terminal(Console):
    """A rich console that ignores markup in text and escapes characters that are not printable.

    Class and file names may hold escape sequences and marks that change the direction of writing; see `printable`. Line
    breaks and tabs stay.

    Args:
        stderr: write to standard error instead of standard output.
        quiet: write nothing.
        wraps: break long lines at words; otherwise the terminal breaks them, and a path can be copied whole.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False, wraps: bool = False) -> None:
        width = None if stderr or sys.stdout.isatty() else _WIDE
        super().__init__(stderr=stderr, quiet=quiet, highlight=False, markup=False, soft_wrap=not wraps, width=width)

    def render_str(self, text: str, **how: Any) -> Text:
        """The text as a rich Text, with the length of its printable form."""
        return super().render_str(_printable_lines(text), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a renderable, made printable; rich's own control codes, as of a progress line, stay."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(_printable_lines(segment.text), segment.style, segment.control)


def allow_any_character() -> None:
    """Make standard output escape what its encoding lacks (Chinese on a latin-1 terminal), as standard error does."""
    stream: Any = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def _printable_lines(text: str) -> str:
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
