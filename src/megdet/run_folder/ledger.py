"""ledger.jsonl: what a run has computed, as a chain of lines in which none can be changed without all that follow.

    {"kind":"start","line":1,"previous":"","step":0,"data":...,"state":{"model":...},"recipe":...,"hash":"5ca1..."}
    {"kind":"steps","line":2,"previous":"5ca1...","since":0,"step":3,...,"state":{...},"hash":"ab1e..."}
    {"kind":"images","line":3,"previous":"ab1e...","step":3,"digest":...,"hash":"77d0..."}
    {"kind":"evaluation","line":4,"previous":"77d0...","step":3,"numbers":...,"detections":...,"hash":"90c3..."}

"hash" is the SHA-256 of the line without it, "previous" that of the line before. A line is never taken back: a run that
goes on from an earlier step writes a start line of that step, and the lines of later steps before it no longer count
(`course`). All digests are SHA-256 in hexadecimal. The hash of the last line, the head, stands for the whole file:
whoever knows it notices every change.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from megdet.errors import InputError
from megdet.files import LARGEST_JSON, cannot_write, parse_json, read_bytes
from megdet.run_folder.folder import encode_non_finite

OF_THE_MACHINE = ("seconds", "data_seconds", "peak_memory_bytes")
"""Keys of a step's line of metrics.jsonl that differ from one computation of the step to the next."""
_SEAL = re.compile(rb'(.*),"hash":"([0-9a-f]{64})"\}', re.DOTALL)


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a start of a run computes with, as far as it may show in the last bits."""

    device: str
    """cpu or cuda"""
    processor: str
    """the name of rank 0's CPU or GPU"""
    instructions: str = ""
    """the vector instructions that torch uses on that CPU, such as AVX512; empty in older ledgers"""
    megdet: str
    torch: str
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    """of a rank"""
    devices: Annotated[int, msgspec.Meta(ge=1)]
    lane_width: int
    largest_share: int
    """images of the largest micro-batch"""
    compiled: bool


class Start(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="start", tag_field="kind"):
    """A start of the run."""

    line: int
    """1 for the first of the file"""
    previous: str
    step: int
    """steps done"""
    roll_backs: int
    rolled_back_to: int
    """as in the checkpoint that it goes on from: the learning rate depends on them"""
    num_images: int
    data: str
    """fingerprint of the training images' names, sizes, boxes, masks and weights"""
    machine: Machine
    state: dict[str, str]
    """the digest of all that a step changes, by its kind in a checkpoint"""
    recipe: str
    """the complete recipe, as YAML"""


class Steps(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="steps", tag_field="kind"):
    """Some steps, and the state after the last of them."""

    line: int
    previous: str
    since: int
    """steps done at the line before that counts"""
    step: int
    """steps done"""
    epoch: float
    """epochs done"""
    images: str
    """the digest of which images these steps had, in their order (`digest_of_images`)"""
    metrics: str
    """the digest of the numbers of these steps (`digest_of_numbers`)"""
    numbers: dict[str, Any]
    """the numbers of the last step"""
    state: dict[str, str]
    """as in a start"""


class Images(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="images", tag_field="kind"):
    """The content of the training images."""

    line: int
    previous: str
    step: int
    """steps done when it was known"""
    digest: str
    """of the file image_digests.json"""


class Evaluated(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="evaluation", tag_field="kind"
):
    """An evaluation of the run."""

    line: int
    previous: str
    step: int
    """steps done by the weights that were evaluated"""
    numbers: dict[str, Any]
    """as in metrics.jsonl"""
    detections: str
    """the digest of the file detections.json"""


Entry = Start | Steps | Images | Evaluated
"""A line of the ledger, without its hash."""


class BrokenChainError(InputError):
    """A line of a ledger is not what was written, or not where it was written."""


@dataclass(frozen=True)
class Chain:
    """A ledger whose lines follow from each other."""

    entries: Sequence[Entry]
    hashes: Sequence[str]
    """of the lines"""
    size: int
    """bytes of its whole lines"""
    is_torn: bool
    """whether half a line follows them, because the run was killed while it wrote"""

    @property
    def head(self) -> str:
        """The hash of the last line, empty where there is none."""
        return self.hashes[-1] if self.hashes else ""


def read_chain(path: Path) -> Chain:
    """Read a ledger and check that each line is what was written and follows from the one before.

    Raises BrokenChainError, which names the first line that does not; InputError where the file cannot be read.
    """
    content = read_bytes(path, LARGEST_JSON)
    size = content.rfind(b"\n") + 1
    entries: list[Entry] = []
    hashes: list[str] = []
    for number, raw in enumerate(content[:size].split(b"\n")[:-1], 1):
        entry, own = _opened(raw, f"{path} line {number}")
        if entry.line != number or entry.previous != (hashes[-1] if hashes else ""):
            raise BrokenChainError(f"{path} line {number}: {_misplaced(entry, number)}")
        entries.append(entry)
        hashes.append(own)
    return Chain(entries, hashes, size, is_torn=size < len(content))


def _opened(raw: bytes, where: str) -> tuple[Entry, str]:
    sealed = _SEAL.fullmatch(raw)
    body = b"" if sealed is None else sealed[1] + b"}"
    if sealed is None or hashlib.sha256(body).hexdigest() != sealed[2].decode():
        raise BrokenChainError(f"{where} is not what was written: it does not have its hash")
    try:
        entry: Entry = parse_json(body, where, Entry)
    except InputError as error:
        raise BrokenChainError(f"{error}: another version of megdet wrote it, or it was written by hand") from None
    return entry, sealed[2].decode()


def _misplaced(entry: Entry, number: int) -> str:
    if entry.line > number:
        missing = f"line {number}" if entry.line == number + 1 else f"lines {number} to {entry.line - 1}"
        return f"here stands what was line {entry.line}: {missing} is missing or was moved"
    if entry.line < number:
        return f"here stands what was line {entry.line}: it was moved or is there twice"
    return "it does not follow from the line before: one of them is of another ledger"


def sealed(entry: Entry) -> tuple[bytes, str]:
    """A line of the file, with its hash and line break, and the hash."""
    body = msgspec.json.encode(entry)
    own = hashlib.sha256(body).hexdigest()
    return body[:-1] + f',"hash":"{own}"}}\n'.encode(), own


def append_line(path: Path, line: bytes, size: int) -> None:
    """Append a line to a file of so many bytes and flush it to the disk; half a line that stands behind them goes.

    Raises InputError where it cannot be written; the file then ends as before.
    """
    try:
        with path.open("r+b" if size else "wb", buffering=0) as file:
            file.truncate(size)
            file.seek(size)
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


def course(entries: Iterable[Entry]) -> list[Start | Steps]:
    """The lines that count: those of steps that were made again after a later start are left out.

    Each says of its steps what the run has in the end. Raises BrokenChainError for a line that does not continue them.
    """
    counted: list[Start | Steps] = []
    for entry in entries:
        if isinstance(entry, Images | Evaluated):
            continue
        if isinstance(entry, Start):
            while counted and counted[-1].step > entry.step:
                counted.pop()
        if not counted:
            if isinstance(entry, Steps):
                raise BrokenChainError(f"line {entry.line}: there is no start of the run before it")
        elif fault := _fault_between(counted[-1], entry):
            raise BrokenChainError(f"line {entry.line}: {fault}")
        counted.append(entry)
    return counted


def _fault_between(before: Start | Steps, entry: Start | Steps) -> str:
    if isinstance(entry, Steps):
        if entry.since == before.step < entry.step:
            return ""
        return f"it has the steps from {entry.since} on, and the last line that counts ends at {before.step}"
    if entry.step > before.step:
        return (
            f"the run went on from step {entry.step}, and what it did after step {before.step} is in no line "
            "(a time with ledger_steps 0?)"
        )
    wrong = [kind for kind in {**before.state, **entry.state} if before.state.get(kind) != entry.state.get(kind)]
    if wrong:
        names = ", ".join(sorted(wrong))
        return f"the run went on from step {entry.step} with another state than line {before.line} has: {names}"
    return ""


def digest_of_numbers(lines: Iterable[Mapping[str, Any]]) -> str:
    """The digest of some steps' lines of metrics.jsonl, without what belongs to the machine."""
    content = hashlib.sha256()
    for line in lines:
        own = {key: value for key, value in line.items() if key not in OF_THE_MACHINE}
        content.update(json.dumps(encode_non_finite(own), sort_keys=True, allow_nan=False).encode() + b"\n")
    return content.hexdigest()


def digest_of_images(steps: Iterable[Sequence[int | str]]) -> str:
    """The digest of the ids of some steps' images, in the order of the plan."""
    content = hashlib.sha256()
    for ids in steps:
        content.update(json.dumps(list(ids)).encode() + b"\n")
    return content.hexdigest()
