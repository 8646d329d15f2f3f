"""TensorBoard: event files in RUN/tensorboard."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megdet.training.trackers.tracker import Opening


def open_tensorboard(opening: Opening) -> "TensorBoard":
    """Event files that go on at a step; events of later steps from an earlier start become invalid."""
    from torch.utils.tensorboard import SummaryWriter  # here, because it takes seconds to import

    folder = opening.folder / "tensorboard"
    writer = SummaryWriter(str(folder), purge_step=opening.first_step + 1)
    if not opening.identity:
        rows = "\n".join(f"| {key} | {value} |" for key, value in opening.recipe.items())
        writer.add_text("recipe", f"| key | value |\n|---|---|\n{rows}")
    return TensorBoard(writer, folder, opening.first_step)


class TensorBoard:
    """The event files of a run."""

    forgets_later_steps = True
    identity = "tensorboard"

    def __init__(self, writer: Any, folder: Path, step: int) -> None:
        self._writer, self._folder, self._step = writer, folder, step
        self.place = str(folder)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        self._step = max(self._step, step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, file: Path) -> None:
        """Write a picture."""
        import numpy as np
        from PIL import Image

        self._writer.add_image(name, np.asarray(Image.open(file).convert("RGB")), self._step, dataformats="HWC")

    def attach(self, file: Path) -> None:
        """Copy the file beside the event files: TensorBoard cannot show it."""
        shutil.copyfile(file, self._folder / file.name)

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()
