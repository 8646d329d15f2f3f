"""Table 1 and Figure 2 of the paper from the runs of a sweep."""

from collections.abc import Sequence
from pathlib import Path

from megdet.analysis.gradients.units import load_study
from megdet.analysis.paper.figures import RatioSeries, plot_ratios
from megdet.analysis.paper.report import Report
from megdet.analysis.paper.rows import Scale, row_name, scale_epoch_factor
from megdet.analysis.paper.tables import TABLE1, TrainingRow
from megdet.analysis.sampling.pictures import draw_proposals, most_and_least_balanced, sampled_images
from megdet.analysis.sampling.ratios import sampling_table
from megdet.distributed.world import World
from megdet.journal.run_folder import RunFolder

_SHOWN = 8
_LOOKED_AT = 64
"""Training images from which the most and the least balanced are shown."""


def ratios_report(scale: Scale, rows: Sequence[TrainingRow], folder: Path) -> Report:
    """Table 1 from the trained rows of 16 and 256 images, and its picture. Raises InputError as `sampling_table`."""
    factor = scale_epoch_factor(scale)
    epochs = sorted({row.epoch for row in TABLE1})
    ends = [round(epoch * factor) for epoch in epochs]
    found = sampling_table([RunFolder(folder / row_name(row)) for row in rows], ends)
    report = Report("table1", scale, ("epoch", "batch", "ratio, paper", "ratio, here", "anchors, here"), [], [], [], [])
    for row in TABLE1:
        own = next(o for o in found if o.epoch == round(row.epoch * factor) and o.batch_size == row.batch_size)
        ours, anchors = 100 * own.roi_ratio, 100 * own.anchor_ratio
        report.rows.append([str(row.epoch), str(row.batch_size), *(f"{n:.2f}" for n in (row.ratio, ours, anchors))])
        report.records.append(
            {
                "epoch": row.epoch,
                "epoch_here": own.epoch,
                "batch_size": row.batch_size,
                "paper_ratio": row.ratio,
                "ratio": ours,
                "anchor_ratio": anchors,
            }
        )
    report.pictures.append(folder / "table1.png")
    plot_ratios([_series(row.batch_size, report) for row in rows], report.pictures[0])
    return report


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


def _series(batch_size: int, report: Report) -> RatioSeries:
    own = [record for record in report.records if record["batch_size"] == batch_size]
    return RatioSeries(
        f"{batch_size} images",
        tuple(float(record["epoch"]) for record in own),
        tuple(float(record["ratio"]) for record in own),
        tuple(float(record["paper_ratio"]) for record in own),
    )
