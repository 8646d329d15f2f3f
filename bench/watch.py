"""What the watch over divergence costs: a training step that judges its gradient, beside one that does not.

    python bench/watch.py --size 320 --batch 2
    python bench/watch.py --size 320 --batch 2 --optimizer lamb --ema 0.999

ResNet-50 FPN, random weights, trained batch norm; all sides in turn, in one process. A whole step varies by more than
the watch costs, so the part of it that the watch changes is timed alone too: a step without an image, which reduces,
judges and updates. `part_of_time` is the difference of the two updates over the whole step.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from real_step import made_batches, made_trainer
from rich.console import Console
from rich.table import Table
from rounds import in_turn, summary
from sides import NUM_CLASSES
from torch import nn
from train_step import make_images

from megdet.distributed.world import World, start_world
from megdet.layers.batch_norm import finish_step
from megdet.recipe import Optimizer, Recipe
from megdet.training import step as step_module
from megdet.training.step import train_step
from megdet.training.trainer import Trainer
from megdet.training.watch import Verdict

WATCHED, PLAIN = "judged", "not judged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images a step, in one group")
    parser.add_argument("--optimizer", choices=["sgd", "adamw", "lars", "lamb"], default="sgd")
    parser.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights, 0 for none")
    parser.add_argument("--rounds", type=int, default=9, help="counted steps of each side, in turn")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    recipe = Recipe(
        batch_size=options.batch,
        bn_size=options.batch,
        optimizer=Optimizer(kind=options.optimizer, ema_decay=options.ema),
    )
    images, boxes, labels, _ = make_images(options.size, options.batch)
    world, trainer = start_world(), made_trainer(recipe, NUM_CLASSES)
    batches = made_batches(images, boxes, labels, recipe)

    def whole() -> object:
        return train_step(trainer, batches, range(len(batches)), 1e-4, 0, world)

    def update() -> object:
        return train_step(trainer, [], range(0), 1e-4, 0, world)

    steps = summary(in_turn({PLAIN: _unjudged(trainer, whole), WATCHED: whole}, options.rounds), WATCHED)
    updates = summary(in_turn({PLAIN: _unjudged(trainer, update), WATCHED: update}, 10 * options.rounds), WATCHED)
    more = updates["seconds"][WATCHED] - updates["seconds"][PLAIN]
    result = {
        **vars(options),
        "step": steps,
        "update": updates,
        "part_of_time": more / steps["seconds"][PLAIN],
    }
    if options.json:
        print(json.dumps(result))
        return
    table = Table("", "whole step, s", "update alone, ms", "smallest to largest")
    for name in (PLAIN, WATCHED):
        low, high = (1e3 * seconds for seconds in updates["spread"][name])
        cells = f"{steps['seconds'][name]:.4f}", f"{1e3 * updates['seconds'][name]:.3f}", f"{low:.3f} to {high:.3f}"
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    console.print(f"the watch is {result['part_of_time']:.3%} of a step")


def _unjudged(trainer: Trainer, call: Callable[[], object]) -> Callable[[], object]:
    """The same step as it was before there was a watch."""
    device = trainer.watch.recent.device
    verdict = Verdict(torch.zeros((), dtype=torch.bool, device=device), torch.zeros((), device=device))

    def run() -> object:
        with _without_watch(trainer, verdict):
            return call()

    return run


@contextmanager
def _without_watch(trainer: Trainer, verdict: Verdict) -> Iterator[None]:
    def fold(modules: Iterable[nn.Module], num_groups: int, world: World, unless: object) -> None:
        del unless
        finish_step(modules, num_groups, world)

    def step(optimizer: torch.optim.Optimizer, unless: object) -> None:
        del unless
        optimizer.found_inf = None
        optimizer.step()

    def average(model: nn.Module, number: int, unless: object) -> None:
        del unless
        update(model, number)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(trainer.watch, "judge", return_value=verdict))
        patches.enter_context(mock.patch.object(step_module, "finish_step", fold))
        patches.enter_context(mock.patch.object(step_module, "step_unless", step))
        if trainer.averages is not None:
            update = trainer.averages.update
            patches.enter_context(mock.patch.object(trainer.averages, "update", average))
        yield


if __name__ == "__main__":
    main()
