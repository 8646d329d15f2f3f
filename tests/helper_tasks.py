"""What helpers are asked to do in tests; in a module of its own, which a helper loads at once."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from megdet.errors import DivergedError


def add(a: int, b: int) -> int:
    return a + b


def refuse() -> None:
    raise DivergedError("step 3: loss is not finite")


def have_a_bug() -> None:
    raise ValueError("no\nsuch thing")


def end(code: int) -> None:
    os._exit(code)


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def not_picklable() -> Any:
    return lambda: 1


def go_on(note: Path | None = None) -> None:
    """Work for an hour with a process of its own, such as one that loads images, whose number it notes."""
    child = subprocess.Popen(["sleep", "3600"])
    if note is not None:
        note.with_suffix(".tmp").write_text(str(child.pid))
        note.with_suffix(".tmp").rename(note)
    time.sleep(3600)
