"""A training step on a GPU: torchvision's reference as it is and channels last, ours as it is and ours compiled.

    python bench/gpu.py
    python bench/gpu.py --tests --out gpu.json          # the GPU tests first; eight minutes in all
    python bench/gpu.py --batches 2,8 --precisions bf16 --json

ResNet-50 FPN Faster R-CNN, the same random weights and numbers on both sides (`sides.py`), trained batch norm, 8 boxes
an image, SGD with momentum; the images are on the GPU already, ours as 8-bit numbers that it normalises. torchvision
has cuDNN's flags as torch sets them, with its channels last also cuDNN's search for the fastest; ours repeats itself
to the bit. For every batch size and precision, of each side in its own turn:

- images a second: steps one after another, the clock read before the first and after the last; median and spread;
- the part of the GPU's peak that its convolutions and matrix products use (`train_step.py` says what counts);
- the most memory that its tensors took;
- how often the host waited for the GPU in a step, as torch's own watch sees it (it sees no collective);
- where the time of a step goes, by events on the GPU's stream: a stage includes waiting for the host. This step alone
  is watched in this way.

A side that does not fit has an `error` instead, and so has one for which no time was left. `--out` is written anew
after every line. Without a GPU there is nothing to measure: exit code 2. Where a GPU test fails it is 1.
"""

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from sides import shared_recipe, training_step
from stages import PARTS, STAGES
from train_step import flop_counter, make_images

from megdet.files import write_json_atomically
from megdet.training.compiled import compile_dense

HEIGHT, WIDTH = 800, 1344
WARMUP = 3
PRECISIONS = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}
SIDES = ("torchvision", "torchvision channels_last", "megdet", "megdet compiled")

PEAKS: dict[str, tuple[float, float, float]] = {
    "H200": (67, 494.5, 989.5),
    "H100 PCIe": (51, 378, 756),
    "H100 NVL": (60, 417.5, 835),
    "H100": (67, 494.5, 989.5),
    "A100": (19.5, 156, 312),
    "L40S": (91.6, 183, 362),
    "L4": (30.3, 60, 121),
    "RTX 4090": (82.6, 82.6, 165.2),
    "RTX 3090": (35.6, 35.6, 71),
}
"""TFLOP/s in fp32, TF32 and bf16 by a word of the device's name, the first that fits. From NVIDIA's data sheets, for
the RTX cards its papers on the architecture: no sparsity, sums in fp32, the boost clock, which no long run holds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="16,2,8,32", metavar="B,B")
    parser.add_argument("--precisions", default="bf16,tf32,fp32", metavar="P,P", help=", ".join(PRECISIONS))
    parser.add_argument("--sides", default=",".join(SIDES), metavar="S,S", help=", ".join(SIDES))
    parser.add_argument("--size", default=f"{HEIGHT}x{WIDTH}", metavar="HxW", help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=10, help="between two looks at the clock")
    parser.add_argument("--rounds", type=int, default=5, help="looks at the clock of each side")
    parser.add_argument("--mode", help="torch.compile's mode, such as max-autotune-no-cudagraphs")
    parser.add_argument("--minutes", type=float, default=8.0, help="no line is begun after them")
    parser.add_argument("--tests", action="store_true", help="run the tests that need a GPU first")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of what there is so far")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device is visible here, so there is nothing to measure", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * options.minutes
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "size": options.size,
        "peak_tflops": dict(zip(PRECISIONS, peak_of(torch.cuda.get_device_name()) or (), strict=False)),
        "steps": options.steps,
        "rounds": options.rounds,
        "mode": options.mode,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "tests": gpu_tests() if options.tests else None,
        "rows": [],
    }
    for batch in options.batches.split(","):
        for precision in options.precisions.split(","):
            for side in options.sides.split(","):
                row = {"side": side, "precision": precision, "batch": int(batch)}
                is_late = time.monotonic() > end
                row |= {"error": "no time was left"} if is_late else measured(side, precision, int(batch), options)
                result["rows"].append(row)
                if options.out:
                    write_json_atomically(options.out, result, indent=1)
    print(json.dumps(result)) if options.json else show(result)
    return 1 if result["tests"] and result["tests"]["exit_code"] else 0


def gpu_tests() -> dict[str, Any]:
    """Runs the tests that are marked `gpu`; their last lines say which failed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n0", "-q", "-rf"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()[-20:]
    print(*lines, sep="\n", file=sys.stderr)
    return {"exit_code": done.returncode, "last_lines": lines}


def measured(side: str, precision: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """What one line of the result says beside its side, precision and batch size."""
    row: dict[str, Any] = {}
    free_memory()
    try:
        flops = flops_of_an_image(side.split()[0], options.size) * batch
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        step = make_step(side, precision, batch, options.size, options.mode)
        for _ in range(WARMUP):
            step()
        torch.cuda.synchronize()
        row["first_steps_seconds"] = time.perf_counter() - started  # with what compiling takes
        seconds = []
        for _ in range(options.rounds):
            started = time.perf_counter()
            for _ in range(options.steps):
                step()
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / options.steps)
        row |= {
            "seconds": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
            "images_per_second": batch / statistics.median(seconds),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            "flops": flops,
            "host_waits": host_waits(step),
            "stage_milliseconds": stages_of(step),
        }
        peaks = peak_of(torch.cuda.get_device_name())
        peak = peaks[list(PRECISIONS).index(precision)] * 1e12 if peaks else None
        row["fraction_of_peak"] = flops / row["seconds"] / peak if peak else None
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    return row


def make_step(side: str, precision: str, batch: int, size: str, mode: str | None = None) -> Callable[[], object]:
    """A side's step, of `megdet train` on one micro-batch that is the whole mini-batch."""
    height, width = (int(edge) for edge in size.split("x"))
    images, boxes, labels, _ = make_images(height, batch, width)
    prepare = partial(compile_dense, mode=mode) if side == "megdet compiled" else lambda _: None
    recipe = shared_recipe(batch, PRECISIONS[precision])
    return training_step(f"{side} {precision}", recipe, images, boxes, labels, prepare)


@cache
def flops_of_an_image(side: str, size: str) -> int:
    """Of the convolutions and matrix products of a step; they are the same in every precision, compiled or not."""
    step = make_step(side, "fp32", 2, size)
    with flop_counter() as counter:
        step()
    del step
    free_memory()
    return counter.get_total_flops() // 2


def free_memory() -> None:
    """A step that is not needed any more holds its model in a cycle of closures."""
    gc.collect()
    torch.cuda.empty_cache()


def host_waits(step: Callable[[], object]) -> int:
    """Operators of a step for whose end on the GPU the host waited."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def stages_of(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each stage of one step without the stages inside it; `rest` is what no stage has."""
    events: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = []
    inside: list[str] = []

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        outer = inside[-1] if inside else None
        inside.append(name)
        start.record()
        yield
        end.record()
        inside.pop()
        events.append((name, outer, start, end))

    def timed(original: Callable[..., Any], name: str | None) -> Callable[..., Any]:
        def function(*arguments: Any, **options: Any) -> Any:
            with stage(name or PARTS[arguments[0].name]):
                return original(*arguments, **options)

        return function

    with ExitStack() as patches:
        for owner, attribute, name in STAGES:
            patches.enter_context(mock.patch.object(owner, attribute, timed(getattr(owner, attribute), name)))
        with stage("rest"):
            step()
    torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for name, outer, start, end in events:
        found[name] += start.elapsed_time(end)
        if outer is not None:
            found[outer] -= start.elapsed_time(end)
    return dict(found)


def peak_of(name: str) -> tuple[float, float, float] | None:
    """The peaks of a device in TFLOP/s, where they are known."""
    return next((peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("batch", "precision", "side", "images a second", "of peak", "memory, GB", "host waits")
    for row in result["rows"]:
        head = (str(row["batch"]), row["precision"], row["side"])
        if "error" in row:
            table.add_row(*head, row["error"])
            continue
        part = "unknown" if row["fraction_of_peak"] is None else f"{row['fraction_of_peak']:.0%}"
        memory = f"{row['peak_memory_bytes'] / 1e9:.1f}"
        table.add_row(*head, f"{row['images_per_second']:.1f}", part, memory, str(row["host_waits"]))
    console.print(table)
    for row in result["rows"]:
        stages = [f"{name} {milliseconds:.2f}" for name, milliseconds in row.get("stage_milliseconds", {}).items()]
        console.print(f"{row['batch']} {row['precision']} {row['side']}, ms: {', '.join(stages) or row['error']}")
    if result["tests"]:
        console.print("GPU tests:", result["tests"]["last_lines"][-1])
    console.print(f"{result['device']}, {result['size']} px, torch {result['torch']}, CUDA {result['cuda']}")


if __name__ == "__main__":
    sys.exit(main())
