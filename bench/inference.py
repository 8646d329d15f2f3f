"""Images a second of inference beside torchvision's: ResNet-50 FPN Faster R-CNN, the same random weights, in turn.

    python bench/inference.py --size 320 --batch 2 --precision fp32

Our side has its batch norms folded (`--plain` leaves them). Each side has a process of its own, as its users have it;
with `--one-process` all share one.
Both keep 1,000 proposals and 100 detections, with a score threshold so low that random weights find something. All
numbers come from one recipe and our weights are torchvision's, converted (`sides.py`), so that both have the same boxes
to suppress.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from rounds import SideProcess, in_turn, serve, summary
from sides import NUM_CLASSES, copy_weights, environment_of, shared_recipe, start_side, torchvision_detector, use_cudnn

from megdet.inference.fold import fold_batch_norms
from megdet.inference.predict import detect_batch
from megdet.inference.trained import place_model
from megdet.model.choice import make_detector
from megdet.precision import arithmetic
from megdet.recipe import Recipe

THRESHOLD = 0.0125  # just above 1 / 81, what random weights give to every class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of our side")
    parser.add_argument("--plain", action="store_true", help="do not fold our batch norms")
    parser.add_argument("--rounds", type=int, default=7, help="counted forwards of each side, in turn")
    parser.add_argument("--one-process", action="store_true", help="all sides in this process")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help="detect with this side, once for each line read, in this process")
    options = parser.parse_args()
    if options.side:
        serve(make_side(options.side, options))
        return
    names = ["torchvision fp32", "torchvision channels_last bf16", f"megdet {options.precision}"]
    if options.precision == "fp32":
        names.remove("torchvision channels_last bf16")
    shape = ["--size", str(options.size), "--batch", str(options.batch), *(["--plain"] if options.plain else [])]
    sides: dict[str, Callable[[], object]] = {}
    for name in reversed(names) if options.one_process else names:  # ours first: it decides about the allocator
        if options.one_process:
            sides[name] = make_side(name, options)
        else:
            sides[name] = SideProcess(__file__, "--side", name, *shape, environment=environment_of(name))
    figures = summary(in_turn({name: sides[name] for name in names}, options.rounds), "torchvision fp32")
    for side_process in sides.values():
        if isinstance(side_process, SideProcess):
            side_process.end()
    medians, side = figures["seconds"], f"megdet {options.precision}"
    result = {
        "size": options.size,
        "batch": options.batch,
        "precision": options.precision,
        "folded": not options.plain,
        "rounds": options.rounds,
        "processes": "one" if options.one_process else "own",
        "ratio": figures["ratios"][side],
        "ratio_to_torchvision_best": min(medians[name] for name in medians if name != side) / medians[side],
        **figures,
        "images_per_second": {name: options.batch / seconds for name, seconds in medians.items()},
        "threads": torch.get_num_threads(),
        "native_bf16": torch.cpu._is_avx512_bf16_supported(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    if options.json:
        print(json.dumps(result))
        return
    table = Table("side", "seconds", "images a second", "against torchvision fp32")
    for name, seconds in medians.items():
        table.add_row(name, f"{seconds:.3f}", f"{options.batch / seconds:.2f}", f"{figures['ratios'][name]:.2f}")
    Console().print(table)


def make_side(name: str, options: argparse.Namespace) -> Callable[[], object]:
    """The forward of a side by its name."""
    device = start_side(name)
    bf16 = name.endswith("bf16")
    recipe = shared_recipe(options.batch, "bfloat16" if bf16 else "float32")
    box_head = replace(recipe.model.box_head, score_threshold=THRESHOLD)
    recipe = replace(recipe, bn_size=0, model=replace(recipe.model, box_head=box_head))
    torch.manual_seed(0)
    images = torch.rand(options.batch, 3, options.size, options.size, device=device)
    use_cudnn(name)
    if name.startswith("megdet"):
        return megdet_side(images, recipe, folds=not options.plain)
    return torchvision_side(images, recipe, bf16=bf16)


def torchvision_side(images: torch.Tensor, recipe: Recipe, *, bf16: bool) -> Callable[[], object]:
    """torchvision's detector in evaluation mode, whose own resizing leaves the images as they are."""
    model = torchvision_detector(recipe, *images.shape[2:]).to(images.device)
    if bf16:
        model = model.to(memory_format=torch.channels_last)
    model.eval()

    def forward() -> object:
        with torch.inference_mode(), arithmetic(recipe.precision, images.device):
            return model(list(images))

    return forward


def megdet_side(images: torch.Tensor, recipe: Recipe, *, folds: bool) -> Callable[[], object]:
    """Our detector on the same images."""
    model = make_detector(recipe, NUM_CLASSES)
    copy_weights(torchvision_detector(recipe, *images.shape[2:]), model)
    place_model(model, images.device, recipe.precision)
    model.eval()
    if folds:
        fold_batch_norms(model)
    pixels = 255 * images
    sizes = torch.tensor([list(images.shape[2:])] * len(images), device=images.device)
    return lambda: detect_batch(model, pixels, sizes, recipe.precision)


if __name__ == "__main__":
    main()
