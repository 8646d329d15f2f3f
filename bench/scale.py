"""One mini-batch on 1, 2, 4, ... processes of this machine: images a second, waiting, collectives, the prediction.

    python bench/scale.py
    python bench/scale.py --devices 1,2,4,8,16 --batch 32 --bn 16 --backbone resnet50

`megdet train` makes --steps steps of the same mini-batch for each number of processes, as many as there are cores by
default, each with one thread: seconds a step (the median, without the first two), the part of them that waits for
images, and efficiency, the images a second of a process over those of the first number. A second, shorter run under
Python's profiler gives the part that rank 0 spends in collectives, which includes waiting for slower ranks. Beside them
stand the seconds and the part of communication that `megdet plan` predicts from measurements of its own.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from plan import predict, recipe_words, run
from rich.console import Console
from rich.table import Table

from megdet.data.demo import draw_demo
from megdet.runtime import usable_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", metavar="N,N", help="processes; default the powers of 2 up to the cores")
    parser.add_argument("--backbone", default="resnet18", help="name of a timm model")
    parser.add_argument("--size", type=int, default=256, help="width and height of the images in pixels")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--bn", type=int, default=8, help="BN size in images")
    parser.add_argument("--sizes", default="1,2,4", metavar="M,M", help="images of the planner's micro-batches")
    parser.add_argument("--steps", type=int, default=10, help="of a run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.plans = "none"
    cores = usable_cores()
    counts = (
        [int(word) for word in options.devices.split(",")]
        if options.devices
        else [2**power for power in range(5) if 2**power <= cores]
    )
    os.environ["OMP_NUM_THREADS"] = "1"  # one process has one core, as each of several has
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="megdet_bench_") as name:
        folder = Path(name)
        draw_demo(folder, num_train=options.batch * options.steps, num_val=4, size=options.size, workers=1)
        words = recipe_words(options, folder)
        short = [word for word in words if "schedule.epochs" not in word] + [f"--schedule.epochs={4 / options.steps}"]
        for devices in counts:
            plan = predict(options, words, devices)["chosen"]
            real, profiled = run(words, devices, "none", folder), run(short, devices, "none", folder, profiled=True)
            speed = options.batch / real["seconds"]
            rows.append(
                {
                    "devices": devices,
                    **{key: plan[key] for key in ("lane_width", "rounds", "micro_batch")},
                    "seconds": real["seconds"],
                    "spread": real["spread"],
                    "images_per_second": speed,
                    "efficiency": speed / devices / (rows[0]["images_per_second"] / rows[0]["devices"])
                    if rows
                    else 1.0,
                    "waiting": real["waiting"],
                    "collectives": profiled["collectives"],
                    "predicted_seconds": plan["seconds"],
                    "predicted_collectives": plan["communication_seconds"] / plan["seconds"],
                }
            )
    if options.json:
        print(json.dumps({**vars(options), "devices": counts, "cores": cores, "rows": rows}))
        return
    table = Table("processes", "lane x rounds x images", "seconds", "images/s", "efficiency", "waiting", "collectives")
    table.add_column("predicted, s")
    table.add_column("collectives")
    for row in rows:
        table.add_row(
            str(row["devices"]),
            f"{row['lane_width']} x {row['rounds']} x {row['micro_batch']}",
            f"{row['seconds']:.3f}",
            f"{row['images_per_second']:.2f}",
            *(f"{row[key]:.0%}" for key in ("efficiency", "waiting", "collectives")),
            f"{row['predicted_seconds']:.3f}",
            f"{row['predicted_collectives']:.0%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
