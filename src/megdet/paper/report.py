"""The output of `megdet reproduce`: a table for the terminal, as Markdown and as JSON, from the rows' outcomes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megdet.files import make_folder, write_json_atomically, write_text_atomically
from megdet.paper.outcome import Outcome
from megdet.paper.rows import Item, Scale, row_name, scale_epoch_factor
from megdet.paper.tables import TrainingRow
from megdet.recipe import Recipe

TITLES: dict[Item, str] = {
    "table1": "Table 1: positive part of the sampled RoIs",
    "table2": "Table 2: mini-batch sizes without batch norm (frozen statistics)",
    "table3": "Table 3: mini-batch sizes and BN sizes",
    "table4": "Table 4: the winning entry of COCO 2017",
    "figure1": "Figure 1: 16 images against 256",
    "figure2": "Figure 2: positive and negative proposals",
    "figure4": "Figure 4: 16 images (long) against 256 (long)",
    "figure5": "Figure 5: detections of the entry",
    "claim-failing": "Large mini-batches without batch norm or without a warmup",
    "claim-large-batch": "16 images against 256 in the same epochs",
    "claim-bn-size": "BN sizes of 16 images",
    "claim-variance": "Eq. 4: k small updates and one large one",
    "past-256": "Mini-batches past 256 images",
    "critical-batch": "Forks of one training at several mini-batches",
    "real-photos": "Mini-batches and BN sizes on real photos",
}
TRAINING_COLUMNS = (
    *("row", "batch", "BN size", "policy", "rate", "mmAP, paper", "mmAP, here", "AP50, here", "mmAR, here"),
    *("time, paper", "time, here", "devices, here", "steps"),
)
TIMES_NOTE = "Times of rows that were trained on different numbers of devices, or beside other work, do not compare."


@dataclass(frozen=True)
class Report:
    """One table or figure of the paper beside our numbers."""

    item: Item
    scale: Scale
    columns: tuple[str, ...]
    rows: list[list[str]]
    records: list[dict[str, Any]]
    """the rows as numbers, for JSON"""
    notes: list[str] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)

    @property
    def title(self) -> str:
        """A heading."""
        return f"{TITLES[self.item]}, scale {self.scale}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "item": self.item,
            "scale": self.scale,
            "title": self.title,
            "rows": self.records,
            "notes": self.notes,
            "pictures": [str(picture) for picture in self.pictures],
        }

    def markdown(self) -> str:
        """The heading, the table, the pictures and the notes."""
        head = f"| {' | '.join(self.columns)} |\n|{'---|' * len(self.columns)}\n"
        body = "".join(f"| {' | '.join(row)} |\n" for row in self.rows)
        pictures = "".join(f"\n![{self.title}]({picture.name})\n" for picture in self.pictures)
        notes = "".join(f"\n{note}\n" for note in self.notes)
        return f"## {self.title}\n\n{head}{body}{pictures}{notes}"

    def write(self, folder: Path) -> list[Path]:
        """Write ITEM.json and ITEM.md into a folder; returns their paths. Raises InputError if that fails."""
        files = [folder / f"{self.item}.json", folder / f"{self.item}.md"]
        make_folder(folder)
        write_json_atomically(files[0], self.as_dict(), indent=2)
        write_text_atomically(files[1], self.markdown())
        return files


def training_report(
    item: Item, scale: Scale, rows: Sequence[TrainingRow], outcomes: Mapping[str, Outcome], pictures: list[Path]
) -> Report:
    """The report for rows of Tables 2 and 3, also for rows that a figure draws."""
    report = Report(item, scale, TRAINING_COLUMNS, [], [], [], pictures)
    for row in rows:
        outcome = outcomes.get(row_name(row))
        report.rows.append(_cells(row, outcome))
        report.records.append(_record(row, outcome))
        if outcome is not None and outcome.status == "failed":
            report.notes.append(f"{row_name(row)} failed here: {outcome.reason}.")
    report.notes.append(TIMES_NOTE)
    return report


def scale_note(scale: Scale, recipe: Recipe) -> str:
    """The changes of a scale in a sentence, from the recipe of one of its rows with the full rate."""
    if scale == "coco":
        return "Scale coco: the packaged recipes of the rows as they are."
    factor = scale_epoch_factor(scale)
    epochs = "one epoch" if factor == 1 else f"{factor:g} epochs"
    clipping = f", gradients clipped to norm {recipe.optimizer.clip_norm:g}" if recipe.optimizer.clip_norm else ""
    return (
        f"Scale {scale}: mini-batches and BN sizes in images as in the paper; {epochs} here for one of the paper's; "
        f"{recipe.model.backbone.name} from {Path(recipe.model.backbone.weights).name or 'random weights'}, short edge "
        f"{recipe.data.short_edges[-1]} px, base rate {recipe.optimizer.base_lr:g} for 16 images, "
        f"{recipe.schedule.warmup_steps} steps of warmup{clipping}."
    )


def row_label(row: TrainingRow) -> str:
    """A row in a picture: `16, frozen`, `256 (long), BN 16`."""
    words = [str(row.batch_size)]
    words += ["(long)"] if row.policy == "long" else []
    words += ["(half rate)"] if row.rate == "half" else []
    return " ".join(words) + (f", BN {row.bn_size}" if row.bn_size else ", frozen")


def percent_text(value: float | None) -> str:
    """A number in percent, or a dash if there is none."""
    return "-" if value is None else f"{value:.1f}"


def _cells(row: TrainingRow, outcome: Outcome | None) -> list[str]:
    cells = [row_name(row), str(row.batch_size), str(row.bn_size), row.policy, row.rate]
    paper = ("failed", "-") if row.failed else (percent_text(row.mmap), f"{row.hours:.1f} h")
    if outcome is None:
        return [*cells, paper[0], "not run", "-", "-", paper[1], "-", "-", "-"]
    here = "failed" if outcome.status == "failed" else percent_text(outcome.mmap)
    time = f"{outcome.hours:.1f} h" if outcome.hours >= 1 else f"{60 * outcome.hours:.1f} min"
    numbers = [percent_text(outcome.ap50), percent_text(outcome.mmar)]
    devices = "mixed" if outcome.ranks_differ else str(outcome.ranks)
    return [*cells, paper[0], here, *numbers, paper[1], time, devices, str(outcome.steps)]


def _record(row: TrainingRow, outcome: Outcome | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "row": row_name(row),
        "batch_size": row.batch_size,
        "bn_size": row.bn_size,
        "policy": row.policy,
        "rate": row.rate,
        "paper_mmap": row.mmap,
        "paper_hours": row.hours,
        "paper_devices": row.num_gpus,
        "status": "not run" if outcome is None else outcome.status,
    }
    if outcome is not None:
        names = ("mmap", "ap50", "mmar", "hours", "steps", "ranks", "ranks_differ", "reason")
        record |= {name: getattr(outcome, name) for name in names}
    return record
