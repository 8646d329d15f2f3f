"""A training step of ours beside torchvision's: a detector on ResNet-50 FPN, same images, same boxes, in turn.

    python bench/train_step.py --size 320 --batch 2 --precision fp32
    python bench/train_step.py --size 320 --batch 2 --model retinanet
    python bench/train_step.py --size 320 --batch 2 --one-process

Each side has a process of its own, as its users have it, and they step in turn. With `--one-process` all share one, so
that torchvision gains from our allocator's habit of keeping freed memory (`distributed/world.py`).

Both sides: the same random weights, trained batch norm, 8 boxes an image (with Mask R-CNN the ellipse in each), SGD
with momentum, and with a second stage 2,000 proposals; all of it comes from one recipe (`sides.py`). Ours gets 8-bit
images and normalises them, as in training. Prints the median seconds of a step, images a second and `ratio`,
torchvision fp32's time over ours.
Compare ratios: the speed of a machine drifts.
`fraction_of_limit` compares our step with the machine's arithmetic: its FLOPs a second over those of one 3 x 3
convolution of oneDNN's, timed in the same rounds. Convolutions and matrix products alone count, a multiply-add as two
FLOPs; RoIAlign, batch norm, activations, sorting, NMS, the losses' sums and the optimizer take time but have none. A
convolution in Winograd's form counts as the plain one that it stands for, so the fraction may exceed 1.
"""

import argparse
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from rounds import SideProcess, in_turn, serve, summary
from sides import BOXES, NUM_CLASSES, THEIRS, environment_of, shared_recipe, start_side, training_step
from torch.utils.flop_counter import FlopCounterMode

from megdet.distributed.world import start_world
from megdet.layers import convolution as convolution_layer

LIMIT = "3 x 3 convolution"
CHANNELS = 256  # of the pyramid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--model", choices=list(THEIRS), default="faster_rcnn", help="kind of detector")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of our side")
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each side, in turn")
    parser.add_argument("--one-process", action="store_true", help="all sides in this process")
    parser.add_argument("--side", help="step this side, once for each line read, in this process")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.side:
        serve(make_side(options.side, options.size, options.batch, options.model))
        return
    ours = f"megdet {options.precision}"
    names = ["torchvision fp32", "torchvision channels_last", "torchvision channels_last bf16", ours]
    if options.precision == "fp32":
        names.remove("torchvision channels_last bf16")
    step = make_side(ours, options.size, options.batch, options.model)
    with flop_counter() as counter:
        step()
    sides: dict[str, Callable[[], object]] = {}
    shape = ["--size", str(options.size), "--batch", str(options.batch), "--model", options.model]
    for name in names:
        if options.one_process:
            sides[name] = step if name == ours else make_side(name, options.size, options.batch, options.model)
        else:
            sides[name] = SideProcess(__file__, "--side", name, *shape, environment=environment_of(name))
    device = start_world().device
    sides[LIMIT], conv_flops = convolution(options.size, options.batch, options.precision == "bf16", device)
    times = in_turn(sides, options.rounds)
    for side in sides.values():
        if isinstance(side, SideProcess):
            side.end()
    report(options, times, counter.get_total_flops(), conv_flops)


def make_side(name: str, size: int, batch: int, kind: str) -> Callable[[], object]:
    """The step of a side by its name."""
    start_side(name)
    images, boxes, labels, _ = make_images(size, batch)
    precision = "bfloat16" if name.endswith("bf16") else "float32"
    return training_step(name, shared_recipe(batch, precision, kind), images, boxes, labels)


def make_images(
    size: int, batch: int, width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.device]:
    """Noise, boxes (batch, BOXES, 4) in pixels and their labels on the device that is there; square without a width."""
    torch.manual_seed(0)
    device = start_world().device
    images = torch.rand(batch, 3, size, width or size, device=device)
    limits = torch.tensor([width or size, size], device=device)
    centers = torch.rand(batch, BOXES, 2, device=device) * limits
    half = (0.03 + 0.2 * torch.rand(batch, BOXES, 2, device=device)) * size
    boxes = torch.cat([centers - half, centers + half], 2).clamp(min=0).minimum(limits.repeat(2))
    return images, boxes, torch.randint(NUM_CLASSES, (batch, BOXES), device=device), device


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Counts convolutions and matrix products, those of `ops.linear` too, which torch's counter does not know.

    Within it no convolution runs in Winograd's form.
    """
    onednn = {}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        onednn[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]
    before, convolution_layer.LEAST_TILES = convolution_layer.LEAST_TILES, sys.maxsize
    try:
        with FlopCounterMode(display=False, custom_mapping=onednn) as counter:
            yield counter
    finally:
        convolution_layer.LEAST_TILES = before


def convolution(size: int, batch: int, bf16: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """The convolution over the pyramid's finest level that stands for what the machine can do, and its FLOPs."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    side = -(-size // 4)
    pixels = torch.rand(batch, CHANNELS, side, side, device=device).to(dtype, memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False, device=device)
    conv = conv.to(dtype=dtype, memory_format=torch.channels_last).requires_grad_(False)
    with flop_counter() as counter:
        conv(pixels)
    return lambda: conv(pixels), counter.get_total_flops()


def report(options: argparse.Namespace, times: dict[str, list[float]], flops: int, conv_flops: int) -> None:
    limit = conv_flops / statistics.median(times.pop(LIMIT))
    figures = summary(times, "torchvision fp32")
    medians, side = figures["seconds"], f"megdet {options.precision}"
    result = {
        "model": options.model,
        "size": options.size,
        "batch": options.batch,
        "precision": options.precision,
        "rounds": options.rounds,
        "processes": "one" if options.one_process else "own",
        "ratio": figures["ratios"][side],
        "ratio_to_torchvision_best": min(medians[name] for name in medians if name != side) / medians[side],
        **figures,
        "images_per_second": {name: options.batch / seconds for name, seconds in medians.items()},
        "flops": flops,
        "limit_flops_per_second": limit,
        "fraction_of_limit": flops / medians[side] / limit,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "native_bf16": torch.cpu._is_avx512_bf16_supported(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    if options.json:
        print(json.dumps(result))
        return
    table = Table("side", "seconds a step", "spread", "images a second", "against torchvision fp32")
    for name, seconds in medians.items():
        spread = f"{min(times[name]):.2f} to {max(times[name]):.2f}"
        table.add_row(
            name,
            f"{seconds:.3f}",
            spread,
            f"{options.batch / seconds:.2f}",
            f"{figures['ratios'][name]:.2f} times as fast",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{options.model}, {options.size} px, batch {options.batch}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    console.print(
        f"{side}: {flops / 1e9:.0f} GFLOP a step, {100 * result['fraction_of_limit']:.0f}% of the speed of a "
        f"plain {LIMIT} ({limit / 1e9:.0f} GFLOP/s)"
    )
    if options.precision == "bf16" and not result["native_bf16"]:
        console.print("this processor has no bfloat16 arithmetic of its own: the bf16 figures mean little")


if __name__ == "__main__":
    main()
