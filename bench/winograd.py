"""3 x 3 convolutions in Winograd's form and by oneDNN, float32 on a CPU: time and rounding error, in turn.

python bench/winograd.py --rounds 9

Maps of a detector on 320 px (two images) and 800 px (one). For the output, the gradient of the input and that of the
weights: milliseconds of both sides, the fastest of the rounds, and how many times as fast ours is. The error is the
root of the mean squared difference of the output to that of float64, in units of the output's own size.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from megdet.memory import keep_freed_memory
from megdet.ops.winograd import convolve_3x3
from megdet.runtime import processor_name

CASES = (
    *((2, 80, 256, 256), (2, 40, 256, 256), (2, 20, 256, 256), (2, 10, 512, 512)),
    *((2, 80, 64, 64), (2, 40, 128, 128), (2, 40, 256, 720)),
    *((1, 200, 256, 256), (1, 100, 128, 128), (1, 50, 256, 256), (1, 25, 512, 512)),
    *((64, 14, 256, 256), (256, 7, 256, 256)),
)
"""Images or RoIs, edge of the map, channels before and after."""
PARTS = ("output", "input gradient", "weight gradient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    rows = [measured(*case, options.rounds) for case in CASES]
    if options.json:
        print(json.dumps({"processor": processor_name(), "threads": torch.get_num_threads(), "cases": rows}))
        return
    table = Table("maps, channels", *PARTS, "error, theirs and ours", title="ms by oneDNN and ours, times as fast")
    for row in rows:
        times = [f"{theirs:.1f} {ours:.1f}  {theirs / ours:.2f}" for theirs, ours in row["ms"].values()]
        images, edge, inputs, outputs = row["case"]
        errors = " ".join(f"{error:.1e}" for error in row["error"])
        table.add_row(f"{images} x {edge} x {edge}, {inputs} to {outputs}", *times, errors)
    Console().print(table)
    Console().print(f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")


def measured(images: int, edge: int, inputs: int, outputs: int, rounds: int) -> dict[str, Any]:
    """Times and errors of a layer."""
    x = torch.randn(images, inputs, edge, edge).relu_().to(memory_format=torch.channels_last)
    weight = (torch.randn(outputs, inputs, 3, 3) * 0.03).to(memory_format=torch.channels_last)
    upstream = torch.randn(images, outputs, edge, edge).to(memory_format=torch.channels_last)
    sides: list[Callable[[], object]] = []
    for layer in (theirs, ours):
        sides += [partial(layer, x, weight), *(backward(layer, x, weight, upstream, of) for of in (0, 1))]
    best = fastest(sides, rounds)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    errors = [
        ((layer(x, weight) - exact).square().mean() / exact.square().mean()).sqrt().item() for layer in (theirs, ours)
    ]
    ms = {part: (1000 * best[place], 1000 * best[place + len(PARTS)]) for place, part in enumerate(PARTS)}
    return {"case": (images, edge, inputs, outputs), "ms": ms, "error": errors}


def backward(
    layer: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor, of: int
) -> Callable[[], object]:
    """The gradient of the input (0) or of the weights (1) alone; the forward is made before."""
    entered = [x, weight]
    entered[of] = entered[of].clone().requires_grad_()
    output = layer(*entered)
    return lambda: torch.autograd.grad(output, entered[of], upstream, retain_graph=True)


def theirs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, weight, padding=1)


def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return convolve_3x3([x], weight)[0]


def fastest(sides: list[Callable[[], object]], rounds: int) -> list[float]:
    """The shortest time of each side; all take turns, and a first round does not count."""
    best = [float("inf")] * len(sides)
    for number in range(rounds + 1):
        for place, side in enumerate(sides):
            started = time.perf_counter()
            side()
            if number:
                best[place] = min(best[place], time.perf_counter() - started)
    return best


if __name__ == "__main__":
    main()
