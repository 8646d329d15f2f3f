"""1 x 1 convolutions of ResNet-50 on one thread by torch's choice and as oneDNN's products, float32, in turn.

    python bench/pointwise.py --size 320 --batch 2

For the output, the gradient of the input and that of the weights: milliseconds of all 1 x 1 convolutions of stride 1
of the backbone together, the fastest of the rounds of each. With one thread and fewer than 16 images torch computes
them in a form of its own, by MKL. Where MKL is at its full speed (Intel) MegDet leaves them to torch; this measures
both there too.
"""

import argparse
import json
from collections import Counter

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from winograd import PARTS, backward, fastest

from megdet.memory import keep_freed_memory
from megdet.ops.pointwise import convolve_1x1
from megdet.ops.products import onednn_is_faster
from megdet.runtime import processor_name

LAYERS = (
    *((4, 64, 64, 1), (4, 64, 256, 4), (4, 256, 64, 2), (4, 256, 128, 1)),
    *((8, 128, 512, 4), (8, 512, 128, 3), (8, 512, 256, 1)),
    *((16, 256, 1024, 6), (16, 1024, 256, 5), (16, 1024, 512, 1)),
    *((32, 512, 2048, 3), (32, 2048, 512, 2)),
)
"""Stride of the map, channels before and after, and how many such layers there are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    total: dict[str, Counter[str]] = {"torch": Counter(), "megdet": Counter()}
    flops = 0
    for stride, inputs, outputs, layers in LAYERS:
        edge = -(-options.size // stride)
        flops += 2 * options.batch * edge**2 * inputs * outputs * layers
        x = torch.randn(options.batch, inputs, edge, edge).to(memory_format=torch.channels_last)
        weight = torch.randn(outputs, inputs, 1, 1)
        upstream = torch.randn(options.batch, outputs, edge, edge).to(memory_format=torch.channels_last)
        sides = []
        for layer in (plain, products):
            sides.append(lambda layer=layer, x=x, weight=weight: layer(x, weight))
            sides += [backward(layer, x, weight, upstream, of) for of in (0, 1)]
        best = iter(fastest(sides, options.rounds))
        for side in total:
            for part in PARTS:
                total[side][part] += 1000 * layers * next(best)
    if options.json:
        shape = {"size": options.size, "batch": options.batch, "rounds": options.rounds}
        machine = {"processor": processor_name(), "onednn_is_faster": onednn_is_faster()}
        print(json.dumps({**shape, **machine, "flops": flops, "ms": total}))
        return
    table = Table("part", "torch, ms", "megdet, ms", "times as fast", "megdet, GFLOP/s")
    for part in PARTS:
        theirs, ours = total["torch"][part], total["megdet"][part]
        table.add_row(part, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}", f"{flops / ours / 1e6:.0f}")
    Console().print(table)
    Console().print(f"{processor_name()}, one thread, torch {torch.__version__}")


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, weight)


def products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return convolve_1x1(x, weight, None)


if __name__ == "__main__":
    main()
