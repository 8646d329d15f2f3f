"""Where the time of a training step goes on a CPU: forward and backward of each stage beside the machine's limit.

    python bench/stages.py --size 320 --batch 2
    python bench/stages.py --size 320 --batch 2 --side "torchvision channels_last"

The step is that of `train_step.py`. A stage's forward is timed around its function, without the stages inside it; its
backward is the sum of the nodes of the graph that the forward made, each timed by its hooks. The limit is the speed of
one 3 x 3 convolution of oneDNN's, timed before every step: `at limit` is what the convolutions and matrix products of
the stage would take at that speed. Batch norm, activations, sorting, NMS and the optimizer count no FLOPs. One in
Winograd's form counts as the plain one, so a stage may be faster than its limit. Medians over the rounds.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import faster_rcnn, rpn
from train_step import convolution, flop_counter, make_side

from megdet.distributed.world import start_world
from megdet.model import box_head, pooling
from megdet.model.backbone import Backbone
from megdet.model.fpn import Fpn
from megdet.model.rpn import Rpn
from megdet.runtime import processor_name
from megdet.training.compiled import PerCanvas

STAGES: list[tuple[Any, str, str | None]] = [
    *((Backbone, "forward", "backbone"), (Fpn, "forward", "FPN"), (Rpn, "forward", "RPN head")),
    *((PerCanvas, "__call__", None), (Rpn, "propose", "proposals"), (Rpn, "losses", "RPN loss")),
    *((box_head.BoxHead, "sample", "RoI sampling"), (pooling, "roi_align", "RoIAlign")),
    (box_head.BoxHead, "forward", "box head"),
    (torchvision.models._utils.IntermediateLayerGetter, "forward", "backbone"),
    (torchvision.ops.FeaturePyramidNetwork, "forward", "FPN"),
    *((rpn.RPNHead, "forward", "RPN head"), (rpn.RegionProposalNetwork, "filter_proposals", "proposals")),
    (rpn.RegionProposalNetwork, "compute_loss", "RPN loss"),
    (torchvision.models.detection.roi_heads.RoIHeads, "select_training_samples", "RoI sampling"),
    (torchvision.ops.MultiScaleRoIAlign, "forward", "RoIAlign"),
    *((faster_rcnn.TwoMLPHead, "forward", "box head"), (faster_rcnn.FastRCNNPredictor, "forward", "box head")),
    *((torch.Tensor, "backward", "backward"), (torch.optim.SGD, "step", "optimizer")),
]
"""What is timed as which stage of a step, on both sides; a compiled part says itself which it is."""
PARTS = {"backbone": "backbone", "fpn": "FPN", "rpn": "RPN head"}
REST = "rest"


@dataclass
class Profile:
    """One step: seconds and FLOPs by stage."""

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    forward_flops: Counter[str] = field(default_factory=Counter)
    backward_flops: Counter[str] = field(default_factory=Counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", default="megdet fp32", help="as sides.py names it")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    step = make_side(options.side, options.size, options.batch, "faster_rcnn")
    for _ in range(2):
        step()
    with flop_counter() as counter:
        counted = profile_of(step, counter)
    limit, flops = convolution(options.size, options.batch, options.side.endswith("bf16"), start_world().device)
    limits, totals, profiles = [], [], []
    for _ in range(options.rounds):
        started = time.perf_counter()
        limit()
        limits.append(time.perf_counter() - started)
        started = time.perf_counter()
        profiles.append(profile_of(step))
        totals.append(time.perf_counter() - started)
    speed, rows = flops / statistics.median(limits), {}
    for name in profiles[0].forward:
        rows[name] = row = {"gflop": {}, "ms": {}, "ms_at_limit": {}}
        for way in ("forward", "backward"):
            own = getattr(counted, f"{way}_flops")[name]
            row["gflop"][way], row["ms_at_limit"][way] = own / 1e9, 1000 * own / speed
            row["ms"][way] = 1000 * statistics.median(getattr(profile, way)[name] for profile in profiles)
    result = {
        **{key: getattr(options, key) for key in ("side", "size", "batch", "rounds")},
        "stages": rows,
        "ms": 1000 * statistics.median(totals),
        "gflop": sum(sum(row["gflop"].values()) for row in rows.values()),
        "limit_gflop_per_second": speed / 1e9,
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "torch": torch.__version__,
    }
    if options.json:
        print(json.dumps(result))
    else:
        show(result)


def profile_of(step: Callable[[], object], counter: FlopCounterMode | None = None) -> Profile:
    """Seconds of the stages of a step, and their FLOPs where there is a counter."""
    found, owned, inside = Profile(), set(), []

    def flops() -> int:
        return counter.get_total_flops() if counter else 0

    def own_nodes(output: Any, name: str) -> None:
        """The nodes that made these tensors and are of no earlier stage are the stage's."""
        nodes = [tensor.grad_fn for tensor in tensors_of(output)]
        while nodes:
            node = nodes.pop()
            if node is None or node in owned:
                continue
            owned.add(node)
            start = [0.0, 0]

            def before(_: Any, start: list[Any] = start) -> None:
                start[:] = time.perf_counter(), flops()

            def after(_: Any, __: Any, start: list[Any] = start) -> None:
                found.backward[name] += time.perf_counter() - start[0]
                found.backward_flops[name] += flops() - start[1]

            node.register_prehook(before)
            node.register_hook(after)
            nodes += [following for following, _ in node.next_functions]

    def timed(original: Callable[..., Any], name: str | None) -> Callable[..., Any]:
        def function(*arguments: Any, **options: Any) -> Any:
            own = name or PARTS[arguments[0].name]
            if own == "backward":
                own_nodes(arguments[0], REST)
            inside.append(own)
            started, before = time.perf_counter(), flops()
            output = original(*arguments, **options)
            seconds, counted = time.perf_counter() - started, flops() - before
            inside.pop()
            for place, sign in ((own, 1), (inside[-1] if inside else REST, -1)):
                found.forward[place] += sign * seconds
                found.forward_flops[place] += sign * counted
            if own == "backward":  # its nodes are timed one by one
                del found.forward[own], found.forward_flops[own]
                found.backward[REST] += seconds - found.backward.total()
            else:
                own_nodes(output, own)
            return output

        return function

    with ExitStack() as patches:
        for owner, attribute, name in STAGES:
            patches.enter_context(mock.patch.object(owner, attribute, timed(getattr(owner, attribute), name)))
        started, before = time.perf_counter(), flops()
        step()
        found.forward[REST] += time.perf_counter() - started
        found.forward_flops[REST] += flops() - before
    return found


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """All tensors in what a stage returned."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        yield from tensors_of(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for own in output:
            yield from tensors_of(own)
    elif hasattr(output, "__dict__"):
        yield from tensors_of(vars(output))


def show(result: dict[str, Any]) -> None:
    table = Table("stage", "forward, ms", "at limit", "backward, ms", "at limit", "GFLOP")
    for name, row in result["stages"].items():
        times = [f"{row[key][way]:.1f}" for way in ("forward", "backward") for key in ("ms", "ms_at_limit")]
        table.add_row(name, *times, f"{sum(row['gflop'].values()):.1f}")
    Console().print(table)
    limit = result["limit_gflop_per_second"]
    part = 1000 * result["gflop"] / limit / result["ms"]
    whole = f"{result['ms']:.0f} ms, {part:.0%} of the limit of {limit:.0f} GFLOP/s"
    Console().print(f"{result['side']}, {result['size']} px, batch {result['batch']}: {whole}")
    Console().print(f"{result['processor']}, {result['threads']} threads, torch {result['torch']}")


if __name__ == "__main__":
    main()
