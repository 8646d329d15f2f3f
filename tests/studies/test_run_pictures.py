"""The pictures of a run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from data_factories import SHARED_DATA, needs_shared_data
from megdet.data.coco import load_coco
from megdet.model.faster_rcnn import FasterRcnn
from megdet.studies.run_pictures import masks_of_truth, plot_course


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
    evaluation["evaluation"]["segm"] = {"AP": 0.4}
    plot_course([*steps, evaluation], FasterRcnn.loss_names, tmp_path / "masks.png")
    with Image.open(tmp_path / "masks.png") as masks, Image.open(tmp_path / "with.png") as drawn:
        assert np.any(np.asarray(masks) != np.asarray(drawn))
    with Image.open(tmp_path / "without.png") as without, Image.open(tmp_path / "with.png") as drawn:
        assert np.asarray(without).shape[2] >= 3
        assert np.any(np.asarray(without) != np.asarray(drawn))


@needs_shared_data
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_masks_of_the_ground_truth_are_drawn_at_the_size_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    folder = SHARED_DATA / "coco_mini"
    file = folder / "annotations" / "instances_val2017.json"
    images = next(path for path in (folder / "val2017", folder / "images" / "val2017") if path.is_dir())
    dataset = load_coco(file, images, keep_empty=True, with_masks=True)
    reference = COCO(str(file))
    for index in range(0, len(dataset), 20):
        masks = masks_of_truth(dataset, index)
        ids = dataset.annotations[index].annotation_ids
        assert masks is not None
        assert len(masks) == len(ids)
        for mask, annotation_id in zip(masks, ids, strict=True):
            differing = mask != reference.annToMask(reference.anns[annotation_id]).astype(bool)
            assert differing.sum() <= 0.02 * mask.sum() + 2, "the points of polygons are kept in float32"
    assert masks_of_truth(load_coco(file, images, keep_empty=True), 0) is None
