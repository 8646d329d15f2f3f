"""Weights & Biases; WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and its other variables say where."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megdet.training.trackers.tracker import PROJECT, Opening


def open_wandb(opening: Opening) -> "WandB":
    """A new wandb run, or the run of an earlier start."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=opening.name,
        id=opening.identity or None,
        resume="allow",
        config=dict(opening.recipe),
        dir=str(opening.folder),
        # its capture of the output would disturb the screen
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
    )
    for prefix in ("train", "evaluation"):
        run.define_metric(f"{prefix}/*", step_metric="step")  # an evaluation may come after later steps
    return WandB(run)


class WandB:
    """A run of wandb."""

    forgets_later_steps = False

    def __init__(self, run: Any) -> None:
        self._run, self.identity = run, str(run.id)
        self.place = f"{Path(run.dir).parent} (`wandb sync` sends it)" if run.offline else str(run.url)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self._run.log({"step": step, **numbers})

    def picture(self, name: str, file: Path) -> None:
        """Send a picture."""
        import wandb

        self._run.log({name: wandb.Image(str(file))})

    def attach(self, file: Path) -> None:
        """Send a page, which is shown as it is."""
        import wandb

        self._run.log({file.stem: wandb.Html(file.read_text(encoding="utf-8"), inject=False)})

    def close(self) -> None:
        """Send what is not sent yet."""
        self._run.finish()
