"""The verb watch: shows a run from another terminal."""

import time
from pathlib import Path

from megdet.cli.options import Arguments
from megdet.errors import InputError
from megdet.screen.drawing import draw
from megdet.screen.live import LiveScreen, takes_screen
from megdet.screen.standing import Standing
from megdet.screen.watching import WatchedRun
from megdet.terminal import Terminal

_SECONDS_BETWEEN_LOOKS = 1.0


def run_watch(arguments: Arguments) -> None:
    """Show a run until it is done or Ctrl-C is pressed; with --once, or without a terminal, show it once."""
    run = WatchedRun(Path(arguments.run))
    terminal = Terminal(wraps=True)
    if arguments.once or arguments.json or not takes_screen(terminal):
        _show_once(run, terminal, arguments)
        return
    try:
        run.look()
        if run.standing is None:
            with terminal.status(run.state(), spinner="line", refresh_per_second=2):
                while run.standing is None:
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
                    run.look()
        _follow(run, terminal)
    except KeyboardInterrupt:
        return  # the way to leave it; the training is another process


def _follow(run: WatchedRun, terminal: Terminal) -> None:
    with LiveScreen(terminal, _standing(run)) as screen:
        while True:
            is_new = run.look()
            if run.standing is None:
                raise InputError(f"{run.folder.path}: the run was moved or deleted while it was watched")
            note = run.state()
            if is_new or note != screen.note:
                screen.standing, screen.note = run.standing, note
                screen.update(now=True)
            if run.standing.is_done:
                return
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _show_once(run: WatchedRun, terminal: Terminal, arguments: Arguments) -> None:
    run.look()
    standing = _standing(run)
    terminal.print(draw(standing, min(terminal.width, 100), run.state()))
    arguments.print_json({**standing.as_dict(), "state": run.state()})


def _standing(run: WatchedRun) -> Standing:
    if run.standing is None:
        raise InputError(f"{run.state()}; in a terminal, without --once and --json, watch waits for it")
    return run.standing
