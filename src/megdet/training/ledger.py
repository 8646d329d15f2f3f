"""The ledger of a run: which lines it gets, and what they say; written by the thread that writes the checkpoints.

A line is written before every checkpoint, SHORT_STRETCH steps after each start and each checkpoint, so that a stretch
of so many steps can be computed again and has a state to be compared with, and `ledger_steps` steps after any line.
"""

import hashlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any

import msgspec
import torch

from megdet import ARITHMETIC, __version__
from megdet.data.coco import CocoDataset
from megdet.data.far.folder import FarFile, ImageFile
from megdet.data.far.opening import far_content
from megdet.distributed.layout import Layout
from megdet.distributed.world import World
from megdet.errors import InputError, printable
from megdet.files import cannot_write, write_json_atomically
from megdet.recipe_file import dump_recipe
from megdet.run_folder.folder import RunFolder, encode_non_finite
from megdet.run_folder.ledger import (
    OF_THE_MACHINE,
    BrokenChainError,
    Chain,
    Entry,
    Evaluated,
    Images,
    Machine,
    Start,
    Steps,
    append_line,
    course,
    digest_of_images,
    digest_of_numbers,
    read_chain,
    sealed,
)
from megdet.runtime import accelerators, processor_name
from megdet.training.run import Run
from megdet.training.trainer import Tensors, digest

SHORT_STRETCH = 3
"""Steps."""
OF_THE_KIND = ("device", "processor", "instructions", "megdet", "torch")
"""Of a `Machine`: what must be equal for an exact run to have the same bits."""


class RunLedger:
    """Decides on every rank which steps get a line; rank 0 writes them.

    Args:
        run: an open run, before its first step.
        folder: of the run.
        say: prints a sentence.
    """

    def __init__(self, run: Run, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._run, self.every, self._last = run, run.recipe.ledger_steps, run.first_step
        self._short = run.first_step + SHORT_STRETCH
        writes = bool(self.every) and run.world.is_first and run.first_step < run.last_step
        self._writer = LedgerWriter(run, folder, say) if writes else None

    def is_due(self, step: int) -> bool:
        """Whether there is a line after so many steps, even without a checkpoint; the same on every rank."""
        return bool(self.every) and (step == self._short or step - self._last >= self.every)

    def noted(self, step: int, *, is_saved: bool) -> None:
        """Learn that there is a line after so many steps, on every rank."""
        self._last = step
        if is_saved:
            self._short = step + SHORT_STRETCH

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a step's line of metrics.jsonl, on rank 0."""
        if self._writer is not None:
            self._writer.add(line)

    def line_of(self, step: int) -> Callable[[Tensors], None] | None:
        """What writes the line after so many steps from a copy of the state; None on ranks that do not."""
        return None if self._writer is None else partial(self._writer.write, step)

    def evaluation_line(self, step: int, numbers: Mapping[str, Any]) -> Callable[[], None] | None:
        """What writes the line of an evaluation, whose detections are in the run folder now; None as in `line_of`.

        Raises InputError.
        """
        if self._writer is None:
            return None
        return partial(self._writer.write_evaluation, step, numbers, file_digest(self._writer.folder.detections))

    def finish(self) -> str:
        """End the ledger of a run that has made its last step; returns the sentence on it, empty where there is none.

        Waits for what is being written. Raises InputError.
        """
        if self._writer is None or self._run.writer is None:
            return ""
        self._run.writer.wait()
        return self._writer.finish()

    def close(self) -> None:
        """Stop what goes on beside the training."""
        if self._writer is not None:
            self._writer.close()


class LedgerWriter:
    """Writes the lines; on rank 0 alone. The arguments are those of `RunLedger`."""

    def __init__(self, run: Run, folder: RunFolder, say: Callable[[str], None]) -> None:
        self.run, self.folder = run, folder
        start = start_of(run)
        chain = _chain_to_continue(folder, start, say)
        if run.recipe.exact and (changed := _other_machine(chain, start.machine)):
            say(
                f"Warning: exact gives the same bits on machines of one kind, and the run goes on on another: {changed}"
                "; from here on its bits are those of no other run"
            )
        self._number, self._head, self._size = len(chain.entries), chain.head, chain.size
        self._append(msgspec.structs.replace(start, line=self._number + 1, previous=self._head))
        self._step = run.first_step
        """the last step that is in a line"""
        self._added: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
        self._waiting: list[Mapping[str, Any]] = []
        """numbers of steps that are in no line yet; of the writing thread"""
        self._stops, self._reader = threading.Event(), ThreadPoolExecutor(1, thread_name_prefix="megdet images")
        self._images: Future[dict[str, str | None] | None] | None = None
        if not any(isinstance(entry, Images) for entry in chain.entries):
            self._images = self._reader.submit(image_digests, run.datasets.train, self._stops.is_set)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a step's line of metrics.jsonl."""
        self._added.put({key: value for key, value in line.items() if key not in OF_THE_MACHINE})

    def write(self, step: int, tensors: Tensors) -> None:
        """Write the line after so many steps, whose numbers have been added, unless it is there. Raises InputError."""
        if step == self._step:
            return
        if self._images is not None and self._images.done():
            self._bind_images()
        while not self._added.empty():
            self._waiting.append(self._added.get())
        own = [line for line in self._waiting if line["step"] <= step]
        plan, ids = self.run.plan, self.run.datasets.train.image_ids
        seen = ([ids[index] for index in plan.order_of(number)] for number in range(self._step, step))
        self._append(
            Steps(
                line=self._number + 1,
                previous=self._head,
                since=self._step,
                step=step,
                epoch=plan.epochs_done(step),
                images=digest_of_images(seen),
                metrics=digest_of_numbers(own),
                numbers=encode_non_finite(own[-1]),
                state=digests(tensors),
            )
        )
        self._step, self._waiting = step, self._waiting[len(own) :]

    def write_evaluation(self, step: int, numbers: Mapping[str, Any], detections: str) -> None:
        """Write the line of an evaluation of the weights after so many steps. Raises InputError."""
        self._append(
            Evaluated(
                line=self._number + 1,
                previous=self._head,
                step=step,
                numbers=encode_non_finite(dict(numbers)),
                detections=detections,
            )
        )

    def finish(self) -> str:
        """Wait until the images are known; returns the sentence on the ledger. Raises InputError."""
        if self._images is not None:
            self._bind_images()
        return f"ledger of {self._number} lines, head {self._head}; megdet audit {self.folder.path} checks it"

    def close(self) -> None:
        """Stop reading images."""
        self._stops.set()
        self._reader.shutdown()

    def _bind_images(self) -> None:
        assert self._images is not None
        found = self._images.result()
        if found is None:
            return
        write_json_atomically(self.folder.image_digests, found, indent=0)
        own = file_digest(self.folder.image_digests)
        self._append(Images(line=self._number + 1, previous=self._head, step=self._step, digest=own))
        self._images = None

    def _append(self, entry: Entry) -> None:
        line, head = sealed(entry)
        append_line(self.folder.ledger, line, self._size)
        self._number, self._head, self._size = entry.line, head, self._size + len(line)


def start_of(run: Run) -> Start:
    """The line of an open run before its first step, without its place in the chain."""
    position = run.position
    return Start(
        line=0,
        previous="",
        step=run.first_step,
        roll_backs=position.roll_backs,
        rolled_back_to=position.rolled_back_to,
        num_images=len(run.datasets.train),
        data=run.fingerprint,
        machine=machine_of(run.layout, run.world, is_compiled=bool(run.compiled)),
        state=digests(run.trainer.state()),
        recipe=dump_recipe(run.recipe),
    )


def _chain_to_continue(folder: RunFolder, start: Start, say: Callable[[str], None]) -> Chain:
    """The ledger that is there; one that is broken, or that this start does not continue, is set aside."""
    if not folder.ledger.exists():
        return Chain([], [], 0, is_torn=False)
    try:
        chain = read_chain(folder.ledger)
        course([*chain.entries, msgspec.structs.replace(start, line=len(chain.entries) + 1)])
    except BrokenChainError as error:
        aside = folder.ledger.with_name(f"damaged_{folder.ledger.name}")
        try:
            folder.ledger.replace(aside)
        except OSError as failure:
            raise cannot_write(aside, failure) from failure
        say(f"Warning: {error}; it is now {aside}, and a new ledger begins at step {start.step}")
        return Chain([], [], 0, is_torn=False)
    return chain


def _other_machine(chain: Chain, now: Machine) -> str:
    """How the kind of machine differs from that of the start before; empty where it does not."""
    starts = [entry for entry in chain.entries if isinstance(entry, Start)]
    if not starts:
        return ""
    before = starts[-1].machine
    changed = [key for key in OF_THE_KIND if getattr(before, key) not in ("", getattr(now, key))]
    return ", ".join(f"{key} {getattr(now, key)}, before {getattr(before, key)}" for key in changed)


def machine_of(layout: Layout, world: World, *, is_compiled: bool) -> Machine:
    """What this process and those beside it compute with."""
    gpus = accelerators(str(world.device))
    return Machine(
        device=world.device.type,
        processor=gpus[world.device.index or 0]["name"] if gpus else processor_name(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        megdet=f"{__version__}, arithmetic {ARITHMETIC}",
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        devices=world.size,
        lane_width=layout.lane_width,
        largest_share=layout.largest_share,
        compiled=is_compiled,
    )


def digests(tensors: Tensors) -> dict[str, str]:
    """The digest of each kind of tensors."""
    return {kind: digest(own) for kind, own in tensors.items()}


def image_digests(dataset: CocoDataset, stops: Callable[[], bool] = lambda: False) -> dict[str, str | None] | None:
    """SHA-256 of each image file by its name, None where it cannot be read; None in all once `stops` says so."""
    found: dict[str, str | None] = {}
    for index, name in enumerate(dataset.file_names):
        if stops():
            return None
        try:
            found[printable(name)] = file_digest(dataset.image_path(index))
        except InputError:
            found[printable(name)] = None
    return found


def file_digest(path: ImageFile) -> str:
    """SHA-256 of a file. Raises InputError."""
    if isinstance(path, FarFile):
        return hashlib.sha256(far_content(path)).hexdigest()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; check the path and its permissions") from error
