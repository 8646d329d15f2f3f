"""Table 1 and Figure 2 from rows that were never trained."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from megdet.paper.outcome import Outcome
from megdet.paper.rows import row_name, rows_of
from megdet.paper.sampling import proposals_report, ratios_report
from megdet.paper.tables import TABLE3
from megdet.run_folder.checkpoint_files import latest_checkpoint, open_checkpoint, update_state
from megdet.run_folder.metrics import MetricsWriter
from megdet.training.datasets import fingerprint
from small_runs import ALONE, save_run, small_recipe, train_set, write_small_set

TRAINED = Outcome("trained", "", 12, 1.0, 1, 30.0, 50.0, 40.0, "", "")


def test_table_1_reads_the_ratio_of_the_papers_epochs(tmp_path: Path) -> None:
    write_small_set(tmp_path, "train", 4)
    rows = rows_of("table1")
    for row in rows:
        recipe = replace(small_recipe(tmp_path), batch_size=row.batch_size, bn_size=16)
        run, _ = save_run(tmp_path / "runs" / row_name(row), recipe)
        with MetricsWriter(run.metrics) as metrics:
            for epoch in range(1, 49):  # four for one of the paper's
                ratio = epoch / 400 + (0.05 if row.batch_size == 256 else 0)
                numbers = {"box_head_positive": ratio, "rpn_positive": 8.0}
                metrics.write({"step": epoch, "epoch": float(epoch), "loss": 1.0, "seconds": 1.0, **numbers})
    report = ratios_report("demo", rows, tmp_path / "runs", {row_name(row): TRAINED for row in rows})
    assert report.columns[2:4] == ("ratio, paper", "ratio, here")
    assert [row[:4] for row in report.rows] == [
        ["1", "16", "5.58", "1.00"],
        ["1", "256", "9.82", "6.00"],
        ["6", "16", "11.77", "6.00"],
        ["6", "256", "16.11", "11.00"],
        ["12", "16", "16.59", "12.00"],
        ["12", "256", "16.91", "17.00"],
    ]
    assert report.records[0]["anchor_ratio"] == pytest.approx(25)  # 8 of 32
    assert (tmp_path / "runs/table1.png").stat().st_size > 10_000


def test_figure_2_shows_images_with_their_proposals(tmp_path: Path) -> None:
    write_small_set(tmp_path, "train", 8)
    recipe = small_recipe(tmp_path)
    run, _ = save_run(tmp_path / "runs" / row_name(TABLE3[0]), recipe)
    checkpoint, dataset = latest_checkpoint(run), train_set(recipe)
    assert checkpoint is not None
    state = open_checkpoint(checkpoint).state
    update_state(checkpoint, msgspec.structs.replace(state, num_images=len(dataset), data=fingerprint(dataset)))
    report = proposals_report("demo", TABLE3[0], tmp_path / "runs", ALONE, 0)
    assert len(report.rows) == 8
    assert all(int(positive) <= int(rois) for _, positive, rois, _ in report.rows)
    assert report.pictures == [tmp_path / "runs/figure2.png"]
    assert report.pictures[0].stat().st_size > 10_000
