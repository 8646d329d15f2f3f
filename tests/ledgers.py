"""Ledgers of no run, written line by line."""

from collections.abc import Sequence
from typing import Any

from megdet.run_folder.ledger import Entry, Images, Machine, Start, Steps, sealed

MACHINE = Machine(
    device="cpu",
    processor="a processor",
    megdet="0.1.0",
    torch="2.11.0",
    threads=1,
    devices=1,
    lane_width=1,
    largest_share=4,
    compiled=False,
)


def start(step: int = 0, **changed: Any) -> Start:
    known = {
        "line": 1,
        "previous": "",
        "step": step,
        "roll_backs": 0,
        "rolled_back_to": -1,
        "num_images": 13,
        "data": "d1" * 32,
        "machine": MACHINE,
        "state": state(step),
        "recipe": "batch_size: 8\n",
    }
    return Start(**{**known, **changed})


def steps(since: int, step: int, **changed: Any) -> Steps:
    known = {
        "line": 1,
        "previous": "",
        "since": since,
        "step": step,
        "epoch": step / 2,
        "images": "11" * 32,
        "metrics": "22" * 32,
        "numbers": {"step": step, "loss": 0.1 * step},
        "state": state(step),
    }
    return Steps(**{**known, **changed})


def images(step: int) -> Images:
    return Images(line=1, previous="", step=step, digest="33" * 32)


def state(step: int) -> dict[str, str]:
    """That of a run which is the same whenever it makes the step."""
    return {"model": f"{step:064x}"}


def written(entries: Sequence[Entry]) -> tuple[bytes, list[str]]:
    """The entries as a file, each in its place of the chain, and the hashes of the lines."""
    content, hashes = b"", [""]
    for number, entry in enumerate(entries, 1):
        own = {name: getattr(entry, name) for name in entry.__struct_fields__}
        line, own_hash = sealed(type(entry)(**{**own, "line": number, "previous": hashes[-1]}))
        content += line
        hashes.append(own_hash)
    return content, hashes[1:]
