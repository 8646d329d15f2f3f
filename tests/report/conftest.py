"""Three runs and their reports."""

from pathlib import Path

import pytest

from megdet.report.report import write_report
from reports import HOSTILE
from written_runs import write_run, write_validation_set


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a0, a1 and b0 on 24 images whose third class has a hostile name; its reports are one.html and all.html."""
    folder = tmp_path_factory.mktemp("runs")
    annotations = write_validation_set(folder, class_names=("bolt", "nut", HOSTILE))
    write_run(folder / "a0", annotations)
    write_run(folder / "a1", annotations, detections_seed=1, seed=1)
    write_run(folder / "b0", annotations, error=3.0, detections_seed=2, base_lr=0.04)
    write_report([folder / "a0"], folder / "one.html", resamples=50)
    write_report([folder / name for name in ("a0", "a1", "b0")], folder / "all.html", resamples=50)
    return folder
