"""Sorting the taps of RoIAlign's gradient by the pixel that they fall on: torch and ours, on a CPU, in turn.

python bench/sorting.py

The taps are those of a step at 64 px with 16 images (512 RoIs), at 320 px with two (1,024) and with four (2,048).
Milliseconds (medians) and how many times as fast ours is, with the smallest and the largest over the rounds.
"""

import argparse
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from rounds import in_turn, summary

from megdet.ops.weighted_bag import stably_sorted
from megdet.runtime import processor_name

CASES = ((512, 5_457), (1_024, 17_050), (2_048, 34_100))
"""RoIs, and pixels of all levels."""
TAPS = 7 * 7 * 16
"""Of a RoI: bins times samples times neighbours."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    table = Table("RoIs", "taps", "pixels", "torch, ms", "ours, ms", "times as fast")
    for rois, pixels in CASES:
        first = torch.randint(0, pixels - 50, (rois, 1))
        taps = (first + torch.randint(0, 50, (rois, TAPS))).reshape(-1)
        sides = {"torch": partial(taps.sort, stable=True), "ours": partial(stably_sorted, taps, pixels)}
        times = in_turn(sides, options.rounds)
        found = summary(times, "torch")
        ms = [f"{1000 * seconds:.1f}" for seconds in found["seconds"].values()]
        least, most = found["ratio_spread"]["ours"]
        table.add_row(
            str(rois), str(len(taps)), str(pixels), *ms, f"{found['ratios']['ours']:.1f} ({least:.1f} to {most:.1f})"
        )
    Console().print(table)
    Console().print(f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
