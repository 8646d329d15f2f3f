"""The start and the end of a process, without what a million objects of torch, torchvision and timm cost there.

They stay until the end. While they are made, the garbage collector would look through them again and again, and at the
end Python would free them one by one: two of the five seconds that a short command takes.
"""

import atexit
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NoReturn

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


def end(code: int) -> NoReturn:
    """End this process with an exit code, by the system, which takes all memory back at once.

    Before, as at any end of Python's, threads end, functions of `atexit` run and what was printed is written. Where it
    cannot be written, Python ends the process and says so.
    """
    # the two steps of Python's own end, by their names there, which the stubs do not list: a function of ours in
    # `atexit` would come before those that are registered earlier
    for finish in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        with suppress(KeyboardInterrupt):  # it ends the wait, and Python's own end goes on, too
            finish()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # as it is where the program was started without one
                stream.flush()
    except (OSError, ValueError):  # its reader has ended, or it is closed
        sys.exit(code)
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)  # what libraries have printed
    os._exit(code)
