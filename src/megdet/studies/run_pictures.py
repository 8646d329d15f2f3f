"""The pictures of a run: its course, and detections beside the ground truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet.data.coco import validation_set
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
    for index in np.linspace(0, len(dataset) - 1, min(_SHOWN, len(dataset))).round().astype(int):
        pixels, results = detect_image(trained, dataset.image_path(int(index)))
        truth = dataset.annotations[int(index)]
        boxes, names, scores, classes = _shown(results, trained, _SHOWN_SCORE)
        sheet.append(
            side_by_side(
                pixels,
                truth.boxes,
                [dataset.class_names[label] for label in truth.labels],
                boxes,
                names,
                scores,
                [trained.class_names.index(dataset.class_names[label]) for label in truth.labels],
                classes,
            )
        )
    detections = folder.pictures / "detections.png"
    write_picture(detections, lambda file: contact_sheet(sheet, 2).save(file, "png"))
    return [course, detections]


def save_picture(
    path: Path, pixels: NDArray[np.uint8], results: list[Result], trained: TrainedDetector, score: float
) -> None:
    """Draw the detections of at least `score` on an image and save it as PNG. Raises InputError."""
    boxes, names, scores, classes = _shown(results, trained, score)
    picture = draw_detections(pixels, boxes, names, scores, classes)
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
    for key, name in (("AP", "mmAP"), ("AP50", "AP50"), ("AR100", "mmAR")):
        numbers.plot(where, [100 * line["evaluation"][key] for line in evaluations], "o-", label=name)
    numbers.set(xlabel="epoch", title="validation", ylim=(0, 100))
    numbers.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def _shown(
    results: list[Result], trained: TrainedDetector, score: float
) -> tuple[NDArray[np.float64], list[str], NDArray[np.float64], list[int]]:
    shown = [result for result in results if result["score"] >= score]
    corners = [(x, y, x + width, y + height) for x, y, width, height in (result["bbox"] for result in shown)]
    classes = [trained.category_ids.index(result["category_id"]) for result in shown]
    return (
        np.array(corners, dtype=np.float64).reshape(-1, 4),
        [trained.class_names[label] for label in classes],
        np.array([result["score"] for result in shown], dtype=np.float64),
        classes,
    )
