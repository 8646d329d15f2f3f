"""The output of `megdet reproduce`: a table for the terminal, as Markdown and as JSON, from the rows' outcomes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from megdet.files import make_folder, write_json_atomically, write_text_atomically
from megdet.paper.outcome import Outcome
from megdet.paper.rows import Item, Scale, row_name, scale_epoch_factor, seed_name
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
    *("time, paper", "time, here", "devices, here", "steps", "seeds"),
)
SEEDS_NOTE = "A number is the mean over the seeds; after it stand the smallest and the largest."
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
    item: Item,
    scale: Scale,
    rows: Sequence[TrainingRow],
    outcomes: Mapping[str, Outcome],
    pictures: list[Path],
    seeds: int = 1,
) -> Report:
    """The report for rows of Tables 2 and 3, also for rows that a figure draws; `outcomes` are by `seed_name`."""
    report = Report(item, scale, TRAINING_COLUMNS, [], [], [], pictures)
    for row in rows:
        own = outcomes_of_row(row, seeds, outcomes)
        report.rows.append(_cells(row, [*own.values()]))
        report.records.append(_record(row, own))
        report.notes.extend(
            f"{seed_name(row, seed)} failed here: {outcome.reason}."
            for seed, outcome in own.items()
            if outcome.status == "failed"
        )
    report.notes.extend([TIMES_NOTE] if seeds == 1 else [SEEDS_NOTE, TIMES_NOTE])
    return report


def outcomes_of_row(row: TrainingRow, seeds: int, outcomes: Mapping[str, Outcome]) -> dict[int, Outcome]:
    """The outcomes of a row's finished seeds, by seed."""
    names = {seed: seed_name(row, seed) for seed in range(seeds)}
    return {seed: outcomes[name] for seed, name in names.items() if name in outcomes}


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


def spread_text(values: Sequence[float]) -> str:
    """The mean of some numbers with the smallest and the largest after it; a dash if there are none."""
    if not values:
        return "-"
    mean = fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})"


def _cells(row: TrainingRow, own: Sequence[Outcome]) -> list[str]:
    cells = [row_name(row), str(row.batch_size), str(row.bn_size), row.policy, row.rate]
    paper = ("failed", "-") if row.failed else (f"{row.mmap:.1f}", f"{row.hours:.1f} h")
    if not own:
        return [*cells, paper[0], "not run", "-", "-", paper[1], "-", "-", "-", "0"]
    failed = sum(outcome.status == "failed" for outcome in own)
    here = spread_text([outcome.mmap for outcome in own if outcome.mmap is not None])
    if failed:
        here = "failed" if failed == len(own) else f"{here}, {failed} failed"
    numbers = [
        spread_text([value for outcome in own if (value := getattr(outcome, name)) is not None])
        for name in ("ap50", "mmar")
    ]
    hours = [outcome.hours for outcome in own]
    time = f"{spread_text(hours)} h" if fmean(hours) >= 1 else f"{spread_text([60 * value for value in hours])} min"
    ranks = {outcome.ranks for outcome in own}
    devices = "mixed" if len(ranks) > 1 or any(outcome.ranks_differ for outcome in own) else str(own[0].ranks)
    steps = sorted({outcome.steps for outcome in own})
    lengths = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    return [*cells, paper[0], here, *numbers, paper[1], time, devices, lengths, str(len(own))]


def _record(row: TrainingRow, own: Mapping[int, Outcome]) -> dict[str, Any]:
    names = ("status", "mmap", "ap50", "mmar", "hours", "steps", "ranks", "ranks_differ", "reason")
    return {
        "row": row_name(row),
        "batch_size": row.batch_size,
        "bn_size": row.bn_size,
        "policy": row.policy,
        "rate": row.rate,
        "paper_mmap": row.mmap,
        "paper_hours": row.hours,
        "paper_devices": row.num_gpus,
        "trainings": [
            {"seed": seed} | {name: getattr(outcome, name) for name in names} for seed, outcome in own.items()
        ],
    }
