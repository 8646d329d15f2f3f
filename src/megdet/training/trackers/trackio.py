"""Trackio; TRACKIO_PROJECT names the project, TRACKIO_DIR the folder, TRACKIO_SPACE_ID a space on the hub."""

import io
import os
import secrets
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from contextvars import Context
from pathlib import Path
from typing import Any

from megdet.training.trackers.tracker import PROJECT, Opening


def open_trackio(opening: Opening) -> "Trackio":
    """A new trackio run, or the run of an earlier start."""
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    # trackio knows a run by its name only, and run folders in different places may have the same name
    name = opening.identity or f"{opening.name}-{secrets.token_hex(3)}"
    with redirect_stdout(io.StringIO()):  # it would greet where results are printed
        # in a context of its own it is nobody's current run: the end of the process would finish that once more, aloud
        run = Context().run(
            trackio.init,
            project=project,
            name=name,
            resume="allow",
            config={key: str(value) for key, value in opening.recipe.items()},
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    return Trackio(run, name, opening.first_step, f"project {project}, run {name} (`trackio show`)")


class Trackio:
    """A run of trackio."""

    forgets_later_steps = False

    def __init__(self, run: Any, identity: str, step: int, place: str) -> None:
        self._run, self.identity, self._step, self.place = run, identity, step, place

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self._step = max(self._step, step)
        self._run.log(dict(numbers), step=step)

    def picture(self, name: str, file: Path) -> None:
        """Send a picture."""
        import trackio

        self._run.log({name: trackio.Image(str(file))}, step=self._step)

    def attach(self, file: Path) -> None:
        """Send a file, as an artifact of its name."""
        self._run.log_artifact(str(file), name=f"{self.identity}-{file.stem}", type="report")

    def close(self) -> None:
        """Send what is not sent yet."""
        with redirect_stdout(sys.stderr):  # what it says is no result; this thread may not hide what others print
            self._run.finish()
