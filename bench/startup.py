"""Processor time from the command to its end for verbs that compute nothing, and what loading costs those that do.

    python bench/startup.py

Every line is a new process; its time is the processor's, user and system, so that a neighbour on the machine counts
little. Lines of imports load what `train` and `detect` load, one package more a line. The last two load the same as
`megdet` does, without the garbage collector, and end as it does, without freeing every object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megdet.data.demo import draw_demo

IMPORTS = {
    "import torch": "torch",
    "import torch and its compiler": "torch, torch._dynamo.utils",
    "import torch, torchvision": "torch, torchvision",
    "import torch, torchvision, timm": "torch, torchvision, timm",
    "import what megdet detect needs": "megdet.cli.results",
    "import what megdet train needs": "megdet.cli.training",
}
AS_MEGDET = """
from megdet.program import Ending, load_function
ending = Ending()
load_function("{}")
ending.code = 0
"""
LOADED = {
    "the same of megdet detect, as megdet loads it": "megdet.cli.results:run_detect",
    "the same of megdet train, as megdet loads it": "megdet.cli.training:run_train",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted processes of each line, in turn")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        imports = {key: ["-c", f"import {value}"] for key, value in IMPORTS.items()}
        loaded = {key: ["-c", AS_MEGDET.format(value)] for key, value in LOADED.items()}
        commands = {**light_commands(folder), **imports, **loaded}
        times: dict[str, list[float]] = {key: [] for key in commands}
        for number in range(options.rounds + 1):
            for key, words in commands.items():
                seconds = processor_seconds([sys.executable, *words], folder)
                if number:  # the first round fills the system's memory with the files
                    times[key].append(seconds)
    result = {
        "rounds": options.rounds,
        "seconds": {key: statistics.median(values) for key, values in times.items()},
        "spread": {key: [min(values), max(values)] for key, values in times.items()},
    }
    if options.json:
        print(json.dumps(result))
        return
    table = Table("process", "processor seconds", "from", "to")
    for key, seconds in result["seconds"].items():
        table.add_row(key, f"{seconds:.2f}", *(f"{bound:.2f}" for bound in result["spread"][key]))
    Console().print(table)


def light_commands(folder: Path) -> dict[str, list[str]]:
    """The verbs that should start at once, by what a user types; their files are drawn into the folder."""
    draw_demo(folder / "demo", num_train=100, num_val=10)
    annotations, images = folder / "demo/annotations/val.json", folder / "demo/val"
    voc = Path(__file__).resolve().parent.parent / "examples/voc"
    words = {
        "--help": "--help",
        "--version": "--version",
        "train --help": "train --help",
        "recipes": "recipes",
        "describe megdet-r50": "describe megdet-r50",
        "simulate": "simulate",
        "data check": f"data check {annotations} {images}",
        "data stats": f"data stats {annotations} {images}",
        "data convert": f"data convert --from voc {voc} {folder / 'converted'}",
    }
    return {f"megdet {key}": ["-m", "megdet", *value.split()] for key, value in words.items()}


def processor_seconds(command: list[str], folder: Path) -> float:
    """Seconds of user and system time of a process that must succeed."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
