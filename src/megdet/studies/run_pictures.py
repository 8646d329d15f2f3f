"""The pictures of a run: its course, and what its detector finds beside the ground truth."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megdet.data.coco import validation_set
from megdet.files import cannot_write, replace_file
from megdet.inference.draw import contact_sheet, draw_detections, side_by_side
from megdet.inference.predict import Result, detect_image
from megdet.inference.trained import TrainedDetector
from megdet.ops.rle import decode_mask
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics

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
        sheet.append(
            side_by_side(
                pixels,
                truth.boxes,
                [dataset.class_names[label] for label in truth.labels],
                truth_class_indices=[trained.class_names.index(dataset.class_names[label]) for label in truth.labels],
                **_shown(results, trained, _SHOWN_SCORE),
            )
        )
    detections = folder.pictures / "detections.png"
    _write(detections, lambda file: contact_sheet(sheet, 2).save(file, "png"))
    return [course, detections]


def save_picture(
    path: Path, pixels: NDArray[np.uint8], results: list[Result], trained: TrainedDetector, score: float
) -> None:
    """Draw the detections of at least `score` on an image and save it as PNG. Raises InputError."""
    picture = draw_detections(pixels, **_shown(results, trained, score))
    _write(path, lambda file: picture.save(file, "png"))


def plot_course(metrics: list[dict[str, Any]], losses_of: Sequence[str], path: Path) -> None:
    """The loss and its terms (`losses_of`), learning rate and evaluations over the epochs."""
    steps = [line for line in metrics if "loss" in line]
    epochs = {line["step"]: line["epoch"] for line in steps}
    evaluations = [line for line in metrics if "evaluation" in line and line["step"] in epochs]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rate, numbers = figure.subplots(1, 3)
    places = [line["epoch"] for line in steps]
    window = max(1, len(steps) // 60)
    for name in ("loss", *losses_of):
        values = _smooth(np.array([line[name] for line in steps], dtype=float), window)
        losses.plot(places, values, label=name.replace("_", " "), linewidth=2 if name == "loss" else 1.2)
    losses.set(xlabel="epoch", title=f"losses (mean of {window} steps)", ylim=(0, None))
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
    for axes in (losses, rate, numbers):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    _write(path, lambda file: figure.savefig(file, dpi=120))


def _write(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Write a picture as a whole; a link of its name is replaced and not followed."""
    content = io.BytesIO()
    save(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.getvalue(), durable=False)
    except OSError as error:
        raise cannot_write(path, error) from None


def _smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    smoothed: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return smoothed


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
