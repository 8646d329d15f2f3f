"""The predictions of `megdet plan` beside real runs on this machine: seconds a step and peak memory.

    python bench/plan.py --devices 1,2
    python bench/plan.py --devices 4 --lane-width 4 --batch 24 --bn 12
    python bench/plan.py --precision bfloat16 --backbone mobilenetv2_100

For each number of devices the planner measures micro-batches of --sizes images in processes side by side, as torchrun
starts them; none of these sizes is the one that is then run. Then `megdet train` makes --steps steps, and its own
`seconds` (the median, without the first two) and the peak of its resident memory stand beside the prediction.
`error` is what was predicted too much, as a part of the real value, or with a minus too little; `within` says whether
memory is within 15% and time within 25%, and the last lines count those that are. The images are drawn in a
temporary folder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megdet.data.demo import draw_demo

# every rank leaves its own peak: that of a child process would hold the peak of the parent that started it
TRAIN = """
import cProfile, json, os, pstats, sys
from pathlib import Path
from megdet.planning.measured_steps import resident_bytes
from megdet.training import run
from megdet.cli.main import main

folder, rank, step = Path(sys.argv[1]), os.environ.get("RANK", "0"), run.train_step
own = cProfile.Profile()

def profiled_step(*arguments):
    own.enable()  # on a CPU the backward runs in this thread too
    try:
        return step(*arguments)
    finally:
        own.disable()

if sys.argv[2] == "profiled":
    run.train_step = profiled_step
code = main([*sys.argv[3:], "--run", str(folder / "run")])  # torchrun would take --run for an option of its own
(folder / f"peak{rank}").write_text(str(resident_bytes("VmHWM")))
if rank == "0":
    part = None
    if sys.argv[2] == "profiled":
        stats = pstats.Stats(own)
        inside = sum(entry[2] for (_, _, name), entry in stats.stats.items() if "_distributed_c10d" in name)
        part = inside / stats.total_tt
    (folder / "collectives").write_text(json.dumps(part))
sys.exit(code)
"""
WARM_UP = 2
WITHIN = {"memory": 0.15, "time": 0.25}
"""How far a prediction may be from the real value, as a part of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", default="1,2", metavar="N,N", help="processes of this machine")
    parser.add_argument("--backbone", default="resnet18", help="name of a timm model")
    parser.add_argument("--size", type=int, default=256, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=12, help="images a step")
    parser.add_argument("--bn", type=int, default=6, help="BN size in images")
    parser.add_argument("--lane-width", type=int, help="processes that carry one group (default: training's choice)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--sizes", default="1,2,4", metavar="M,M", help="images of the measured micro-batches")
    parser.add_argument("--plans", default="none,block", metavar="P,P", help="recompute plans")
    parser.add_argument("--steps", type=int, default=10, help="of a real run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="megdet_bench_") as name:
        folder = Path(name)
        draw_demo(folder, num_train=options.batch * options.steps, num_val=4, size=options.size, workers=1)
        for devices in map(int, options.devices.split(",")):
            words = recipe_words(options, folder)
            plan = predict(options, words, devices)
            for recompute in options.plans.split(","):
                rows.append(compared(plan, run(words, devices, recompute, folder), recompute))
    if options.json:
        print(json.dumps({**vars(options), "limits": WITHIN, "rows": rows}))
        return
    table = Table("devices", "recompute", "micro-batch", "predicted, s", "real, s", "error", "within")
    for head in ("GiB", "real", "error", "within"):
        table.add_column(head)
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("devices", "recompute", "micro_batch")),
            *(f"{row[key]:.3f}" for key in ("predicted_seconds", "seconds")),
            f"{row['seconds_ratio'] - 1:+.1%}",
            said(row, "time"),
            *(f"{row[key] / 2**30:.2f}" for key in ("predicted_bytes", "bytes")),
            f"{row['bytes_ratio'] - 1:+.1%}",
            said(row, "memory"),
        )
    Console().print(table)
    for what, limit in WITHIN.items():
        Console().print(f"{what} within {limit:.0%}: {sum(row['within'][what] for row in rows)} of {len(rows)}")


def said(row: dict[str, Any], what: str) -> str:
    """Whether the prediction of a row holds, in a word."""
    return "yes" if row["within"][what] else "MISSED"


def recipe_words(options: argparse.Namespace, folder: Path) -> list[str]:
    """The demo recipe on the drawn images, with the sizes that are asked and the layout that is forced."""
    keys: dict[str, Any] = {
        "data.draw_demo": "",
        **{f"data.{split}_annotations": folder / f"annotations/{split}.json" for split in ("train", "val")},
        **{f"data.{split}_images": folder / split for split in ("train", "val")},
        "data.short_edges": f"[{options.size}]",
        "data.max_long_edge": options.size,
        "model.backbone.name": options.backbone,
        "batch_size": options.batch,
        "bn_size": options.bn,
        "precision": options.precision,
        "schedule.epochs": 1,
        "evaluation.every_epochs": 0,
    }
    words = ["demo", "--device", "cpu", "--workers", "1", *(f"--{key}={value}" for key, value in keys.items())]
    return words if options.lane_width is None else [*words, "--lane-width", str(options.lane_width)]


def predict(options: argparse.Namespace, words: list[str], devices: int) -> dict[str, Any]:
    """The plan, from processes side by side."""
    command = [sys.executable, "-m", "megdet", "plan", *words, "--devices", str(devices), "--json"]
    command += ["--sizes", options.sizes, "--plans", options.plans, "--side-by-side", str(devices)]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def run(words: list[str], devices: int, recompute: str, folder: Path, *, profiled: bool = False) -> dict[str, Any]:
    """Seconds of a step, the largest peak of a rank, and the part of a step that waits for images, of a real run.

    Profiled, which makes steps slower: also the part that rank 0 spends in collectives.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    (place / "train.py").write_text(TRAIN)
    start = [sys.executable]
    if devices > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
    command = [*start, str(place / "train.py"), str(place), "profiled" if profiled else "plain", "train", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([*command, "--recompute", recompute], stdout=subprocess.DEVNULL, check=True, env=environment)
    written = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in written if "loss" in line][WARM_UP:]
    seconds = [line["seconds"] for line in lines]
    return {
        "seconds": statistics.median(seconds),
        "bytes": max(int(file.read_text()) for file in place.glob("peak*")),
        "spread": [min(seconds), max(seconds)],
        "waiting": sum(line["data_seconds"] for line in lines) / sum(seconds),
        "collectives": json.loads((place / "collectives").read_text()),
    }


def compared(plan: dict[str, Any], real: dict[str, Any], recompute: str) -> dict[str, Any]:
    """A row: what was predicted for the layout that training chooses, and what it was."""
    chosen = plan["chosen"]
    same = ("devices", "lane_width", "micro_batch", "rounds")
    predicted = next(
        layout
        for layout in plan["layouts"]
        if layout["recompute"] == recompute and all(layout[key] == chosen[key] for key in same)
    )
    ratios = {"memory": predicted["bytes"] / real["bytes"], "time": predicted["seconds"] / real["seconds"]}
    return {
        **{key: predicted[key] for key in (*same, "recompute", "communication_seconds")},
        "predicted_seconds": predicted["seconds"],
        "predicted_bytes": predicted["bytes"],
        **real,
        "seconds_ratio": ratios["time"],
        "bytes_ratio": ratios["memory"],
        "within": {what: abs(ratio - 1) <= WITHIN[what] for what, ratio in ratios.items()},
    }


if __name__ == "__main__":
    main()
