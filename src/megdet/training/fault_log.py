"""Faults that a run has survived (lost images, dead processes, short memory): gathered from all ranks and reported.

Each fault is a line in metrics.jsonl with its step, so that a resume drops the faults of steps that it makes again;
replaced_images.json lists the images.
"""

from collections.abc import Sequence
from typing import Any

from megdet.data.loader import LoadingFaults
from megdet.data.unreadable import Replaced, most_replaced
from megdet.errors import InputError
from megdet.files import write_json_atomically
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter, read_metrics
from megdet.training.report import Reporter
from megdet.training.run import Run

_MOST_NAMED = 5


class FaultLog:
    """Collects the faults of a run; every rank has one and calls the same methods.

    Args:
        run: its `faults` are taken.
        folder: the run folder.
        reporter: prints the faults.
        metrics: on rank 0; has the faults of earlier starts.
    """

    def __init__(self, run: Run, folder: RunFolder, reporter: Reporter, metrics: MetricsWriter | None) -> None:
        self.run, self.folder, self.reporter, self.metrics = run, folder, reporter, metrics
        self._images: dict[int | str, dict[str, Any]] = {}
        self._restarts, self._repeated = 0, 0
        for line in [] if metrics is None else read_metrics(metrics.path):
            for row in line.get("replaced", []):
                self._count(row)
            self._restarts += line.get("loading_restarts", 0)
            self._repeated += line.get("repeated_for_memory", 0)
        self._most = most_replaced(run.recipe.data.most_replaced, len(run.datasets.train))

    def gather(self, step: int) -> None:
        """Take the faults on all ranks up to step 1, 2, ...; all ranks wait for each other.

        Raises InputError on every rank if more images are lost than the recipe allows.
        """
        own_part = self.run.faults.take(), self.run.trainer.pieces.take_repeated()
        parts: list[tuple[LoadingFaults, int]] = self.run.world.gather_objects(own_part)
        gathered, repeated = [faults for faults, _ in parts], sum(number for _, number in parts)
        found = sorted({(one.step, one.image, one.by): one for own in gathered for one in own.replaced}.items())
        restarts = sum(own.restarts for own in gathered)
        if found or restarts or repeated:
            self.run.world.on_first(lambda: self._write([one for _, one in found], restarts, repeated, step))

    def tell(self) -> None:
        """Print the faults that this run has survived since its first start."""
        if self._images:
            names = ", ".join(row["file"] for row in list(self._images.values())[:_MOST_NAMED])
            more = f" and {len(self._images) - _MOST_NAMED} more" if len(self._images) > _MOST_NAMED else ""
            self.reporter.say(
                f"images that could not be read and were replaced: {len(self._images)} ({names}{more}); "
                f"{self.folder.replaced_images} lists them"
            )
        if self._restarts:
            self.reporter.say(f"loading processes that died and were restarted: {self._restarts}")
        if self._repeated:
            self.reporter.say(f"steps that were made again in smaller pieces, as memory ran out: {self._repeated}")

    def _write(self, found: Sequence[Replaced], restarts: int, repeated: int, step: int) -> None:
        assert self.metrics is not None
        dataset = self.run.datasets.train
        lines: dict[int, list[dict[str, Any]]] = {}
        for one in found:
            row = {
                "image_id": dataset.image_ids[one.image],
                "file": dataset.file_names[one.image],
                "by": dataset.image_ids[one.by],
                "reason": one.reason,
            }
            lines.setdefault(one.step + 1, []).append(row)
            if self._count(row):
                self.reporter.say(f"Warning: {row['file']} is replaced by image {row['by']}: {one.reason}")
        for number, rows in lines.items():
            self.metrics.write({"step": number, "replaced": rows})
        if restarts:
            self._restarts += restarts
            self.metrics.write({"step": step, "loading_restarts": restarts})
        if repeated:
            self._repeated += repeated
            self.metrics.write({"step": step, "repeated_for_memory": repeated})
        if found:
            write_json_atomically(self.folder.replaced_images, list(self._images.values()), indent=2)
        if len(self._images) > self._most:
            raise InputError(
                f"{len(self._images)} images of {dataset.annotations_file} could not be read, more than "
                f"data.most_replaced {self.run.recipe.data.most_replaced:g} allows; {self.folder.replaced_images} "
                "lists them: put them back, or raise the key"
            )

    def _count(self, row: dict[str, Any]) -> bool:
        """Count a replacement; returns whether it is the first of its image."""
        known = self._images.get(row["image_id"])
        times = 1 if known is None else known["times"] + 1
        self._images[row["image_id"]] = {
            "image_id": row["image_id"],
            "file": row["file"],
            "reason": row["reason"],
            "times": times,
        }
        return known is None
