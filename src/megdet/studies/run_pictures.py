"""The pictures of a run: its course, and detections beside the ground truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet.data.coco import CocoDataset, validation_set
from megdet.data.masks import place_mask
from megdet.data.rle import decode_mask
from megdet.inference.draw import contact_sheet, draw_detections, side_by_side
from megdet.inference.predict import Result, detect_image
from megdet.inference.trained import TrainedDetector
from megdet.plotting import panels, save_figure, write_picture
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.studies.rates.trial import smooth

_SHOWN = 6
_SHOWN_SCORE = 0.5


def draw_run(trained: TrainedDetector, folder: RunFolder) -> list[Path]:
    """Draw `course.png` and `detections.png` (some validation images) into the run's pictures; returns their paths."""
    course = folder.pictures / "course.png"
    plot_course(read_metrics(folder.metrics), trained.model.loss_names, course)
    dataset = validation_set(trained.recipe.data, with_masks=trained.model.has_masks)
    sheet = []
    for index in np.linspace(0, len(dataset) - 1, min(_SHOWN, len(dataset))).round().astype(int).tolist():
        pixels, results = detect_image(trained, dataset.image_path(index))
        truth = dataset.annotations[index]
        sheet.append(
            side_by_side(
                pixels,
                truth.boxes,
                [dataset.class_names[label] for label in truth.labels],
                truth_class_indices=[trained.class_names.index(dataset.class_names[label]) for label in truth.labels],
                truth_masks=masks_of_truth(dataset, index),
                **_shown(results, trained, _SHOWN_SCORE),
            )
        )
    detections = folder.pictures / "detections.png"
    write_picture(detections, lambda file: contact_sheet(sheet, 2).save(file, "png"))
    return [course, detections]


def save_picture(
    path: Path, pixels: NDArray[np.uint8], results: list[Result], trained: TrainedDetector, score: float
) -> None:
    """Draw the detections of at least `score` on an image and save it as PNG. Raises InputError."""
    picture = draw_detections(pixels, **_shown(results, trained, score))
    write_picture(path, lambda file: picture.save(file, "png"))


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
    """The masks of an image's objects, at the size of its file; None where they have not been read."""
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


def _shown(results: list[Result], trained: TrainedDetector, score: float) -> dict[str, Any]:
    """What `draw_detections` takes, of the results of at least this score."""
    shown = [result for result in results if result["score"] >= score]
    corners = [(x, y, x + width, y + height) for x, y, width, height in (result["bbox"] for result in shown)]
    classes = [trained.category_ids.index(result["category_id"]) for result in shown]
    masks = [decode_mask(result["segmentation"]) for result in shown if "segmentation" in result]
    return {
        "boxes": np.array(corners, dtype=np.float64).reshape(-1, 4),
        "labels": [trained.class_names[label] for label in classes],
        "scores": np.array([result["score"] for result in shown], dtype=np.float64),
        "class_indices": classes,
        "masks": masks or None,
    }
