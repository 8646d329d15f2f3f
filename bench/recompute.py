"""What each recompute plan saves and costs: activations kept and seconds of a forward and backward.

    python bench/recompute.py --backbone resnet50 --size 512 --batch 4

By default the backbone alone; `--whole` measures the whole detector. Every plan runs in turn in one process. Memory is
what operators put out and is still alive, each storage once: kept between forward and backward, and at most in both.
"""

import argparse
import gc
import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from rounds import in_turn, summary
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megdet.distributed.world import start_world
from megdet.inference.trained import place_model
from megdet.model.choice import make_detector
from megdet.model.detector import Detector
from megdet.precision import arithmetic
from megdet.recipe import Recipe, RecomputePlan
from megdet.structures import Targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50", help="name of a timm model")
    parser.add_argument("--size", type=int, default=512, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--norm", choices=["batch", "frozen"], default="batch", help="in the backbone")
    parser.add_argument("--whole", action="store_true", help="the whole detector instead of the backbone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = start_world().device
    plans = get_args(RecomputePlan)
    models = {plan: make_model(options, plan, device) for plan in plans}
    sides = {plan: make_forward(options, model, device) for plan, model in models.items()}
    memory = {plan: activation_bytes(forward, models[plan]) for plan, forward in sides.items()}
    steps = {plan: (lambda forward=forward: forward().backward()) for plan, forward in sides.items()}
    figures = summary(in_turn(steps, options.rounds), "none")
    medians = figures["seconds"]
    rows = [
        {
            "plan": plan,
            "kept_mib": round(memory[plan][0] / 2**20, 1),
            "kept_ratio": round(memory["none"][0] / memory[plan][0], 2),
            "peak_mib": round(memory[plan][1] / 2**20, 1),
            "peak_ratio": round(memory["none"][1] / memory[plan][1], 2),
            "seconds": round(medians[plan], 3),
            "time_ratio": round(medians[plan] / medians["none"], 3),
            "seconds_spread": [round(seconds, 3) for seconds in figures["spread"][plan]],
            "time_ratio_spread": [round(1 / ratio, 3) for ratio in reversed(figures["ratio_spread"][plan])],
        }
        for plan in plans
    ]
    if options.json:
        print(json.dumps({**vars(options), "torch": torch.__version__, "rows": rows}))
        return
    table = Table("plan", "kept, MiB", "times less", "at most, MiB", "times less", "seconds", "times as long")
    for row in rows:
        table.add_row(*(str(value) for key, value in row.items() if not key.endswith("spread")))
    Console().print(table)


def make_model(options: argparse.Namespace, plan: RecomputePlan, device: torch.device) -> Detector:
    """A detector in training mode."""
    torch.manual_seed(0)
    recipe = Recipe(batch_size=options.batch, bn_size=options.batch, recompute=plan)
    backbone = replace(recipe.model.backbone, name=options.backbone, norm=options.norm)
    recipe = replace(recipe, model=replace(recipe.model, backbone=backbone))
    model = make_detector(recipe, 80)
    place_model(model, device, recipe.precision)
    return model.train()


def make_forward(options: argparse.Namespace, model: Detector, device: torch.device) -> Callable[[], Tensor]:
    """A function that makes one forward and returns the loss."""
    size, batch = options.size, options.batch
    images = torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    centers = torch.rand(batch, 8, 2, device=device) * size
    half = (0.03 + 0.2 * torch.rand(batch, 8, 2, device=device)) * size
    boxes = torch.cat([centers - half, centers + half], 2).clamp(0, size)
    targets = Targets(boxes, torch.randint(80, (batch, 8), device=device), torch.arange(batch, device=device))
    sizes = torch.tensor([[size, size]] * batch, device=device)

    def forward() -> Tensor:
        model.zero_grad(set_to_none=False)  # so that gradients stay where they are
        with arithmetic(options.precision, device):
            if not options.whole:
                return torch.stack([level.float().mean() for level in model.backbone(images)]).sum()
            losses = model.losses(images, sizes, targets)
            return torch.stack([losses[name].sum() for name in model.loss_names]).sum()

    return forward


class _Watch(TorchDispatchMode):
    """Counts the bytes that operators put out and that are still alive, each storage once, but for some tensors."""

    def __init__(self, apart: Iterable[Tensor]) -> None:
        super().__init__()
        self.apart = {tensor.untyped_storage()._cdata for tensor in apart}
        self.alive: dict[int, tuple[Any, int]] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return found

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive and key not in self.apart:
            self.alive[key] = (weakref.ref(storage, lambda _storage: self._forget(key)), storage.nbytes())
            self.bytes += storage.nbytes()

    def _forget(self, key: int) -> None:
        self.bytes -= self.alive.pop(key)[1]


def activation_bytes(forward: Callable[[], Tensor], model: Detector) -> tuple[int, int]:
    """Bytes alive between forward and backward, and the most that were alive at any time of both."""
    forward().backward()  # gradients and caches are there afterwards
    gc.collect()
    own = [tensor for p in model.parameters() for tensor in (p.data, p.grad) if tensor is not None]
    with _Watch([*own, *model.buffers()]) as watch:
        loss = forward()
        gc.collect()
        kept = watch.bytes
        loss.backward()
    return kept, watch.peak


if __name__ == "__main__":
    main()
