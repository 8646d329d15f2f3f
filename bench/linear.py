"""The first fully connected layer of the box head by oneDNN and by torch's own choice (MKL), float32, in turn.

python bench/linear.py --rois 1024
"""

import argparse
import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from megdet.ops.linear import linear

INPUTS, OUTPUTS = 256 * 7 * 7, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rois", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    x, weight = torch.randn(options.rois, INPUTS), torch.randn(OUTPUTS, INPUTS) * 0.01
    x.requires_grad_()
    weight.requires_grad_()
    upstream = torch.randn(options.rois, OUTPUTS)
    times: dict[str, list[float]] = {"torch": [], "ours": []}
    for number in range(options.rounds + 1):
        for name, function in (("torch", F.linear), ("ours", linear)):
            started = time.perf_counter()
            function(x, weight, None).backward(upstream)
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    flops = 3 * 2 * options.rois * INPUTS * OUTPUTS
    if options.json:
        print(json.dumps({"rois": options.rois, "seconds": medians, "ratio": medians["torch"] / medians["ours"]}))
        return
    table = Table("side", "ms, forward and backward", "GFLOP/s", "times as fast")
    for name, seconds in medians.items():
        ratio = f"{medians['torch'] / seconds:.2f}"
        table.add_row(name, f"{seconds * 1000:.0f}", f"{flops / seconds / 1e9:.0f}", ratio)
    Console().print(table)


if __name__ == "__main__":
    main()
