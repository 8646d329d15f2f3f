"""Table 1 and Figure 2 of the paper from the runs of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megdet.distributed.world import World
from megdet.paper.figures import plot_ratios
from megdet.paper.outcome import Outcome
from megdet.paper.report import Report
from megdet.paper.rows import Scale, row_name, scale_epoch_factor
from megdet.paper.tables import TrainingRow
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.studies.gradients.units import load_study
from megdet.studies.sampling.pictures import draw_proposals, most_and_least_balanced, sampled_images
from megdet.studies.sampling.ratios import Ratio, sampling_table
from megdet.studies.sampling.table1 import TABLE1

_SHOWN = 8
_LOOKED_AT = 64
"""Training images from which the most and the least balanced ones are chosen."""


def ratios_report(scale: Scale, rows: Sequence[TrainingRow], folder: Path, outcomes: Mapping[str, Outcome]) -> Report:
    """Table 1 from the rows of 16 and 256 images, and its picture; a missing epoch of a failed row is a dash.

    Raises InputError as `sampling_table` does, for rows that did not fail.
    """
    factor = scale_epoch_factor(scale)
    found = _ratios(rows, folder, outcomes, [round(epoch * factor) for epoch in sorted({epoch for epoch, _ in TABLE1})])
    report = Report("table1", scale, ("epoch", "batch", "ratio, paper", "ratio, here", "anchors, here"), [], [], [], [])
    for (paper_epoch, batch_size), paper_ratio in TABLE1.items():
        epoch = round(paper_epoch * factor)
        own = next((o for o in found if (o.epoch, o.batch_size) == (epoch, batch_size)), None)
        ours, anchors = (None, None) if own is None else (100 * own.ratios["RoI"], 100 * own.ratios["anchor"])
        cells = ("-" if number is None else f"{number:.2f}" for number in (paper_ratio, ours, anchors))
        report.rows.append([str(paper_epoch), str(batch_size), *cells])
        report.records.append(
            {
                "epoch": paper_epoch,
                "epoch_here": epoch,
                "batch_size": batch_size,
                "paper_ratio": paper_ratio,
                "ratio": ours,
                "anchor_ratio": anchors,
            }
        )
    for name in map(row_name, rows):
        if name not in outcomes:
            report.notes.append(f"{name} is not finished: another process trains it.")
        elif outcomes[name].status == "failed":
            report.notes.append(f"{name} failed here: {outcomes[name].reason}.")
    report.pictures.append(folder / "table1.png")
    plot_ratios(report.records, report.pictures[0])
    return report


def _ratios(
    rows: Sequence[TrainingRow], folder: Path, outcomes: Mapping[str, Outcome], epochs: list[int]
) -> list[Ratio]:
    """The ratios of all epochs of the trained rows, and of the finished epochs of the failed ones."""
    folders = {row_name(row): RunFolder(folder / row_name(row)) for row in rows}
    trained = [own for name, own in folders.items() if name in outcomes and outcomes[name].status == "trained"]
    found = sampling_table(trained, epochs) if trained else []
    for name, own in folders.items():
        finished = [epoch for epoch in epochs if epoch <= _finished_epochs(own)]
        if name in outcomes and outcomes[name].status == "failed" and finished:
            found += sampling_table([own], finished)
    return found


def _finished_epochs(folder: RunFolder) -> int:
    lines = read_metrics(folder.metrics) if folder.metrics.exists() else []
    return int(max((line["epoch"] for line in lines if "box_head_positive" in line), default=0) + 1e-6)


def proposals_report(scale: Scale, row: TrainingRow, folder: Path, world: World, workers: int) -> Report:
    """Figure 2: training images of a trained row with their positive and negative proposals."""
    study = load_study(RunFolder(folder / row_name(row)), world.device)
    found = sampled_images(study, min(_LOOKED_AT, len(study.dataset)), workers)
    shown = most_and_least_balanced(found, _SHOWN)
    picture = folder / "figure2.png"
    draw_proposals(shown, f"{row_name(row)} after {study.step} steps", picture)
    return Report(
        "figure2",
        scale,
        ("image", "positive", "RoIs", "ratio"),
        [
            [image.file_name, str(int(image.is_positive.sum())), str(len(image.rois)), f"{100 * image.ratio:.1f}"]
            for image in shown
        ],
        [{"image": image.file_name, "ratio": 100 * image.ratio} for image in shown],
        [],
        [picture],
    )
