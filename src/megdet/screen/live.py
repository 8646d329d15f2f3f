"""A screen at the bottom of a terminal that is drawn again when its numbers change; messages stay above it."""

import time
from types import TracebackType

from rich.console import RenderableType
from rich.live import Live

from megdet.screen.drawing import draw
from megdet.screen.standing import Standing
from megdet.terminal import Terminal

SECONDS_BETWEEN_DRAWINGS = 0.5


class LiveScreen:
    """A context manager; inside it, whatever this process prints appears above the screen.

    It is drawn by the thread that calls it and by no other, so between two calls nothing moves and nothing is spent.
    Leaving it, however that comes about, leaves the last screen and a terminal as it was.

    Args:
        terminal: where it is drawn; see `takes_screen`.
        standing: what it shows.
    """

    def __init__(self, terminal: Terminal, standing: Standing) -> None:
        self.terminal, self.standing, self.note = terminal, standing, ""
        self._live = Live(console=terminal, auto_refresh=False, vertical_overflow="crop", get_renderable=self._drawing)
        self._drawn = -SECONDS_BETWEEN_DRAWINGS

    def update(self, *, now: bool = False) -> None:
        """Draw the standing if half a second has gone by since it was last drawn, or `now`."""
        if now or time.monotonic() - self._drawn >= SECONDS_BETWEEN_DRAWINGS:
            self._live.refresh()
            self._drawn = time.monotonic()

    def _drawing(self) -> RenderableType:
        return draw(self.standing, self.terminal.width, self.note)

    def __enter__(self) -> "LiveScreen":
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()


def takes_screen(terminal: Terminal) -> bool:
    """Whether a screen can be drawn there: a terminal that understands control codes."""
    return terminal.is_terminal and not terminal.is_dumb_terminal
