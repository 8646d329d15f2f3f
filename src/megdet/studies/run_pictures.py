"""The pictures of a run: its course, and detections beside the ground truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet.data.coco import CocoDataset, validation_set
from megdet.data.masks import place_mask
from megdet.detections import SHOWN_SCORE
from megdet.drawing import contact_sheet, side_by_side
from megdet.files import write_picture
from megdet.inference.predict import detect_image
from megdet.inference.trained import TrainedDetector
from megdet.plotting import panels, save_figure
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.studies.rates.trial import smooth

_SHOWN = 6


def draw_run(trained: TrainedDetector, folder: RunFolder) -> list[Path]:
    """Draw `course.png` and `detections.png` (some validation images) into the run's pictures; returns their paths."""
    course = folder.pictures / "course.png"
    plot_course(read_metrics(folder.metrics), trained.model.loss_names, course)
    dataset = validation_set(trained.recipe.data, with_masks=trained.model.has_masks)
    sheet = []
    for index in np.linspace(0, len(dataset) - 1, min(_SHOWN, len(dataset))).round().astype(int).tolist():
        found, truth = detect_image(trained, dataset.image_path(index)).above(SHOWN_SCORE), dataset.annotations[index]
        sheet.append(
            side_by_side(
                found.image,
                truth.boxes,
                [dataset.class_names[label] for label in truth.labels],
                truth_class_indices=[trained.class_names.index(dataset.class_names[label]) for label in truth.labels],
                truth_masks=masks_of_truth(dataset, index),
                boxes=found.boxes,
                labels=found.names,
                scores=found.scores,
                class_indices=found.labels.tolist(),
                masks=[found.mask(row) for row in range(len(found))] if found.masks else None,
            )
        )
    detections = folder.pictures / "detections.png"
    write_picture(detections, lambda file: contact_sheet(sheet, 2).save(file, "png"))
    return [course, detections]


def plot_course(metrics: list[dict[str, Any]], losses_of: Sequence[str], path: Path) -> None:
    """The loss and its terms (`losses_of`), learning rate and evaluations over the epochs."""
    steps = [line for line in metrics if "loss" in line]
    epochs = {line["step"]: line["epoch"] for line in steps}
    evaluations = [line for line in metrics if "evaluation" in line and line["step"] in epochs]
    figure, (losses, rate, numbers) = panels(3, (12.0, 3.8))
    places = [line["epoch"] for line in steps]
    reach = len(steps) // 120
    for name in ("loss", *losses_of):
        values = smooth(np.array([line[name] for line in steps], dtype=float), reach)
        losses.plot(places, values, label=name.replace("_", " "), linewidth=2 if name == "loss" else 1.2)
    losses.set(xlabel="epoch", title=f"losses (mean of {2 * reach + 1} steps)", ylim=(0, None))
    losses.legend(fontsize=8, frameon=False)
    rate.plot(places, [line["learning_rate"] for line in steps], color="0.3")
    rate.set(xlabel="epoch", title="learning rate", ylim=(0, None))
    where = [epochs[line["step"]] for line in evaluations]
    of_masks = [line for line in evaluations if "segm" in line["evaluation"]]
    for kind, key, name in (
        ("bbox", "AP", "mmAP"),
        ("bbox", "AP50", "AP50"),
        ("bbox", "AR100", "mmAR"),
        *([("segm", "AP", "mask mmAP")] if of_masks else []),
    ):
        numbers.plot(where, [100 * line["evaluation"][kind][key] for line in evaluations], "o-", label=name)
    numbers.set(xlabel="epoch", title="validation", ylim=(0, 100))
    numbers.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def masks_of_truth(dataset: CocoDataset, index: int) -> list[NDArray[np.bool_]] | None:
    """The masks of an image's objects, at the size of its file; None if masks were not read."""
    if dataset.annotations.segmentations is None:
        return None
    height, width = dataset.sizes[index].tolist()
    masks = []
    for segmentation in dataset.annotations.segmentations_of(index):
        x, y, pixels = place_mask(segmentation, (height, width), (height, width))
        mask = np.zeros((height, width), np.bool_)
        mask[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        masks.append(mask)
    return masks
