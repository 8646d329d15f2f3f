"""The start and the end of a process, without what a million objects of torch, torchvision and timm cost there.

They stay until the end. While they are made, the garbage collector would look through them again and again, and at the
end Python would free them one by one: two of the five seconds that a short command takes.
"""

import atexit
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

UNUSED = ("wandb",)
"""Packages that timm imports where they are installed, for what no command uses; a tracker imports its own later."""


@contextmanager
def loading(without: Sequence[str] = ()) -> Iterator[None]:
    """A context for imports, in which the garbage collector rests: what is imported stays.

    Args:
        without: packages that others import if they are installed, and that this process has no use for in them.
    """
    kept_out = {name for name in without if name not in sys.modules}
    was_enabled = gc.isenabled()
    gc.disable()
    sys.modules.update(dict.fromkeys(kept_out))  # type: ignore[arg-type]  # None makes an import fail
    try:
        yield
    finally:
        for name in kept_out:
            sys.modules.pop(name, None)
        if was_enabled:
            gc.enable()


def load_function(place: str) -> Callable[..., Any]:
    """The function at `module:function`, loaded for a process of ours."""
    module, _, function = place.partition(":")
    with loading(UNUSED):
        loaded: Callable[..., Any] = getattr(import_module(module), function)
    return loaded


class Ending:
    """The quick end of this process: by the system, which takes all memory back at once, instead of object by object.

        ending = Ending()
        ending.code = main()
        sys.exit(ending.code)

    Threads have ended and functions of `atexit` have run by then, and what was printed is written. It must be made
    before anything else registers a function with `atexit`: they run in reverse order. Without a code, as after an
    exception, the process ends as Python ends it.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        """the exit code"""
        atexit.register(self._end)

    def _end(self) -> None:
        if self.code is None:
            return
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:  # as it is where the program was started without one
                    stream.flush()
        except (OSError, ValueError):  # its reader has ended, or it is closed: Python knows what to say
            return
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # what libraries have printed
        os._exit(self.code)
