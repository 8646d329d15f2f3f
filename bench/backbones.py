"""The base models of the winning entry in the paper's detector: weights, arithmetic, memory and time of a step.

    python bench/backbones.py --size 800 --batch 2
    python bench/backbones.py --docs docs/winning_entry.md      # writes the table into the page

Each has a process of its own. Parameters are those of the whole detector (80 classes) and of its backbone; GFLOPs those
of the backbone's and of the whole dense forward (backbone, pyramid, RPN) of one image, a multiply-add as two FLOPs.
A step is that of `megdet train` on made-up images with 8 boxes each, batch norm over the mini-batch, nothing
recomputed: the median of the counted ones after one that is not. Memory is the peak of the process less what it had
after its imports, on a GPU the peak of what was allocated.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memory import PRECISIONS, resident_mib
from real_step import real_step
from torch.utils.flop_counter import FlopCounterMode
from train_step import make_images

from megdet.distributed.world import start_world
from megdet.model.faster_rcnn import FasterRcnn
from megdet.planning.counting import meta_detector
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe
from megdet.runtime import processor_name

NAMES = (
    *("resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("seresnext50_32x4d", "seresnext101_32x4d", "senet154"),
)
CLASSES = 80
START, END = "<!-- bench/backbones.py -->", "<!-- end -->"
"""Around the table in a page."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="timm models; those of the winning entry if there is none")
    parser.add_argument("--size", type=int, default=800, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each")
    parser.add_argument("--one", help="measure this one, in this process")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--docs", type=Path, help="write the table into this page")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.one, options)))
        return
    rows = [row_of(name, options) for name in options.names or NAMES]
    if options.json:
        print(json.dumps({"options": {**vars(options), "docs": str(options.docs)}, "rows": rows}))
        return
    text = table(rows, options)
    if options.docs:
        page = options.docs.read_text(encoding="utf-8")
        options.docs.write_text(with_table(page, text), encoding="utf-8")
    print(text)


def recipe_of(name: str, batch: int, precision: str) -> Recipe:
    """The paper's detector on another base model, every norm a batch norm over the mini-batch."""
    recipe = load_recipe("megdet-r50")
    backbone = replace(recipe.model.backbone, name=name, frozen_stages=0)
    model = replace(recipe.model, backbone=backbone)
    return replace(recipe, batch_size=batch, bn_size=batch, precision=PRECISIONS[precision], model=model)


def counted(recipe: Recipe, size: int) -> dict[str, float]:
    """Millions of parameters and GFLOPs, without memory for the numbers."""
    detector = meta_detector(replace(recipe, precision="float32"), CLASSES).eval()
    assert isinstance(detector, FasterRcnn)
    image = torch.zeros(1, 3, size, size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as backbone:
        detector.backbone(image)
    with torch.no_grad(), FlopCounterMode(display=False) as dense:
        detector.rpn(detector.features(image))
    return {
        "backbone_parameters": sum(p.numel() for p in detector.backbone.parameters()) / 1e6,
        "parameters": sum(p.numel() for p in detector.parameters()) / 1e6,
        "backbone_gflops": backbone.get_total_flops() / 1e9,
        "gflops": dense.get_total_flops() / 1e9,
    }


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one base model."""
    recipe = recipe_of(name, options.batch, options.precision)
    row: dict[str, Any] = {"name": name, **counted(recipe, options.size)}
    device = start_world().device
    images, boxes, labels, device = make_images(options.size, options.batch)
    before = resident_mib("VmRSS")
    step = real_step(images, boxes, labels, CLASSES, recipe)
    seconds = []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    row["seconds"] = statistics.median(seconds[1:])
    is_gpu = device.type == "cuda"
    row["mib"] = torch.cuda.max_memory_allocated(device) / 2**20 if is_gpu else resident_mib("VmHWM") - before
    row["device"] = torch.cuda.get_device_name(device) if is_gpu else processor_name()
    return row


def row_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one base model, measured in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--size", str(options.size), "--batch", str(options.batch)]
    command += ["--precision", options.precision, "--steps", str(options.steps)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The rows in Markdown, and where they were measured."""
    lines = [
        f"Images of {options.size} x {options.size} pixels, {options.batch} a step, {options.precision}, torch "
        f"{torch.__version__}, {rows[0]['device']}.",
        "",
        "| `backbone.name` | weights, millions: backbone, all | GFLOPs: backbone, dense part | peak, MiB | a step |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        weights = f"{row['backbone_parameters']:.1f}, {row['parameters']:.1f}"
        work = f"{row['backbone_gflops']:.0f}, {row['gflops']:.0f}"
        lines.append(f"| `{row['name']}` | {weights} | {work} | {row['mib']:,.0f} | {row['seconds']:.3g} s |")
    return "\n".join(lines)


def with_table(page: str, text: str) -> str:
    """A page with another table between its two marks."""
    if START not in page or END not in page:
        raise SystemExit(f"the page has no marks {START} and {END}")
    return re.sub(f"{START}.*?{END}", lambda _: f"{START}\n{text}\n{END}", page, flags=re.DOTALL)


if __name__ == "__main__":
    main()
