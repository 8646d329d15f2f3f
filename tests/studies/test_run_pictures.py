"""The pictures of a run."""

from pathlib import Path

import numpy as np
from PIL import Image

from megdet.model.faster_rcnn import FasterRcnn
from megdet.studies.run_pictures import plot_course


def test_the_course_of_a_run_is_drawn_also_before_its_first_evaluation(tmp_path: Path) -> None:
    steps = [
        {
            "step": step,
            "epoch": step / 4,
            "learning_rate": 0.1,
            "loss": 4.0 / step,
            **dict.fromkeys(FasterRcnn.loss_names, 1.0 / step),
        }
        for step in range(1, 9)
    ]
    plot_course(steps, FasterRcnn.loss_names, tmp_path / "without.png")
    evaluation = {"step": 8, "evaluation": {"bbox": {"AP": 0.5, "AP50": 0.7, "AR100": 0.6}}}
    plot_course([*steps, evaluation], FasterRcnn.loss_names, tmp_path / "with.png")
    with Image.open(tmp_path / "without.png") as without, Image.open(tmp_path / "with.png") as drawn:
        assert np.asarray(without).shape[2] >= 3
        assert np.any(np.asarray(without) != np.asarray(drawn))
