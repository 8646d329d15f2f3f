"""What batch norm over two processes costs: the batch norms of ResNet-50, forward and backward.

    python bench/batch_norm.py --size 320 --batch 2

Two processes of one thread (gloo), or one GPU each (NCCL), a group of `--batch` images a process. Sides, in turn,
layer by layer on the same tensors: torch's local batch norm, ours over both processes (merged and two-pass), a plain
version on differentiable all-reduces, and on GPUs `nn.SyncBatchNorm`. Prints the sum over the layers of the median time
of a forward and backward of each side, over that of the local one.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, nn

from megdet.distributed.lane import make_lane
from megdet.distributed.layout import Layout
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.layers.batch_norm import CrossDeviceBatchNorm

RANKS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images a process")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the input")
    parser.add_argument("--format", choices=["channels_last", "contiguous"], default="channels_last")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shapes = norm_shapes(options.size, options.batch)
    times, spread = run_in_ranks(measure, RANKS, shapes, options.precision, options.format, options.rounds)[0]
    local = times["local"]
    result = {
        "layers": len(shapes),
        "size": options.size,
        "batch": options.batch,
        "precision": options.precision,
        "format": options.format,
        "rounds": options.rounds,
        "milliseconds": times,
        "spread": spread,
        "over_local": times["ours"] / local,
        "plain_over_ours": times["plain all-reduce"] / times["ours"],
        "torch": torch.__version__,
    }
    if options.json:
        print(json.dumps(result))
        return
    table = Table("side", "ms, forward and backward", "over local")
    for name, milliseconds in times.items():
        table.add_row(name, f"{milliseconds:.0f}", f"{milliseconds / local:.2f}")
    Console().print(table)


def norm_shapes(size: int, batch: int) -> list[tuple[int, ...]]:
    """The input shapes of ResNet-50's batch norms."""
    shapes: list[tuple[int, ...]] = []
    model = timm.create_model("resnet50", features_only=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _module, given: shapes.append((batch, *given[0].shape[1:])))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return shapes


def measure(
    world: World, shapes: list[tuple[int, ...]], precision: str, memory_format: str, rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Milliseconds of each side, and the smallest and largest of a round; every rank calls it.

    The layers' medians are added up: an interrupted round of one layer is in the spread alone.
    """
    lane = make_lane(world, Layout(1, RANKS, RANKS, RANKS))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    kinds: dict[str, Callable[[int], nn.Module]] = {
        "local": nn.BatchNorm2d,
        "ours": lambda channels: CrossDeviceBatchNorm(channels, lane=lane),
        "ours, two-pass": lambda channels: CrossDeviceBatchNorm(channels, lane=lane, two_pass=True),
        "plain all-reduce": PlainBatchNorm,
    }
    if world.device.type == "cuda":
        kinds["nn.SyncBatchNorm"] = nn.SyncBatchNorm
    times = dict.fromkeys(kinds, 0.0)
    sums = {name: [0.0] * rounds for name in kinds}
    for shape in shapes:
        x = torch.randn(shape, device=world.device).to(dtype).contiguous(memory_format=layout)
        upstream = torch.randn_like(x)
        norms = {name: kind(shape[1]).to(world.device) for name, kind in kinds.items()}
        taken: dict[str, list[float]] = {name: [] for name in kinds}
        for number in range(rounds + 1):
            for name, norm in norms.items():
                own = x.detach().requires_grad_()
                world.barrier()
                started = time.perf_counter()
                norm(own).backward(upstream)
                if own.is_cuda:
                    torch.cuda.synchronize()
                if number:  # the first round warms up
                    taken[name].append(time.perf_counter() - started)
        for name, values in taken.items():
            times[name] += statistics.median(values) * 1000
            sums[name] = [total + value * 1000 for total, value in zip(sums[name], values, strict=True)]
    return times, {name: [min(totals), max(totals)] for name, totals in sums.items()}


class _AllReduce(torch.autograd.Function):
    """A sum over the processes, whose gradient is the sum of the gradients."""

    @staticmethod
    def forward(_ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total


class PlainBatchNorm(nn.Module):
    """Algorithm 1 written down with differentiable all-reduces, as most would write it first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over all processes."""
        norm, wide = self.norm, x.float()
        count = RANKS * x.numel() // x.shape[1]
        mean = _AllReduce.apply(wide.sum((0, 2, 3))) / count
        centered = wide - mean.reshape(1, -1, 1, 1)
        var = _AllReduce.apply((centered * centered).sum((0, 2, 3))) / count
        with torch.no_grad():
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var * count / (count - 1), norm.momentum)
        scale = (norm.weight * (var + norm.eps).rsqrt()).reshape(1, -1, 1, 1)
        return (centered * scale + norm.bias.reshape(1, -1, 1, 1)).to(x.dtype)


if __name__ == "__main__":
    main()
