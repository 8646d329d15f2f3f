"""Figure 2: training images with the positive and negative proposals on which the box head is trained."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from megdet.data.loader import training_batches
from megdet.distributed.layout import recipe_layout
from megdet.errors import InputError
from megdet.model.detector import Samples
from megdet.ops.integer_hash import hash_integers
from megdet.plotting import save_figure
from megdet.precision import arithmetic
from megdet.structures import Batch
from megdet.studies.gradients.units import Study

POSITIVE, NEGATIVE, TRUTH = "#25d366", "#ff3b30", "#ffffff"
NEGATIVES_SHOWN = 16
"""Largest number of negative proposals drawn in an image; the paper's figure shows only some, too."""
_COLUMNS = 4
_LEAST_SIDE = 2.6  # inches


@dataclass(frozen=True)
class SampledImage:
    """An augmented training image with the RoIs sampled for its loss; boxes in pixels of the image."""

    file_name: str
    pixels: UInt8[Tensor, "height width 3"]
    truth: Float[Tensor, "truths 4"]
    rois: Float[Tensor, "rois 4"]
    is_positive: Bool[Tensor, " rois"]

    @property
    def ratio(self) -> float:
        """The fraction of its RoIs that is positive; 0 without RoIs."""
        return float(self.is_positive.float().mean()) if len(self.rois) else 0.0


@torch.no_grad()
def samples_of(study: Study, batch: Batch) -> Samples:
    """The boxes that the model samples from a batch while it trains."""
    with arithmetic(study.recipe.precision, study.device):
        images = study.model.normalized(batch.pixels, batch.sizes)
        return study.model.samples(images, batch.sizes, batch.targets)


def sampled_images(study: Study, num_images: int, workers: int) -> list[SampledImage]:
    """The first images of the run's plan, rounded up to whole groups, each with its sample.

    Raises InputError if there are fewer images, or if none is asked for.
    """
    recipe = study.recipe
    if not 1 <= num_images <= len(study.dataset):
        raise InputError(f"--images {num_images}: choose 1 to {len(study.dataset)}, which the training set has")
    layout = recipe_layout(recipe, 1)
    steps = -(-num_images // recipe.batch_size)
    batches = training_batches(study.dataset, study.plan, layout, 0, (0, steps), workers=workers, device=study.device)
    found: list[SampledImage] = []
    for batch in islice(batches, -(-num_images // recipe.images_per_group)):
        found += _images_of(study, batch, samples_of(study, batch))
    return found


def _images_of(study: Study, batch: Batch, sampled: Samples) -> list[SampledImage]:
    images = []
    for i, index in enumerate(batch.image_index):
        height, width = (int(edge) for edge in batch.sizes[i])
        is_valid = sampled.is_valid[i]
        images.append(
            SampledImage(
                study.dataset.file_names[index],
                batch.pixels[i, :, :height, :width].permute(1, 2, 0).cpu(),
                batch.targets.boxes[i][batch.targets.is_box[i]].cpu(),
                sampled.boxes[i][is_valid].cpu(),
                sampled.is_positive[i][is_valid].cpu(),
            )
        )
    return images


def most_and_least_balanced(images: list[SampledImage], shown: int) -> list[SampledImage]:
    """The most imbalanced images, then the most balanced ones: half of `shown` each, none twice."""
    ordered = sorted(images, key=lambda image: image.ratio)
    if len(ordered) <= shown:
        return ordered
    return ordered[: (shown + 1) // 2] + ordered[len(ordered) - shown // 2 :]


def draw_proposals(images: list[SampledImage], title: str, path: Path) -> None:
    """Draw images with their positive and some of their negative proposals, as Figure 2 does.

    Raises InputError if the picture cannot be written.
    """
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(columns * _LEAST_SIDE, rows * (_LEAST_SIDE + 0.3) + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, axis in enumerate(axes):
        axis.set_axis_off()
        if place < len(images):
            _draw_image(axis, images[place], f"({chr(ord('a') + place)})" if place < 26 else "")
    legend = [
        Line2D([], [], color=POSITIVE, linewidth=2, label="positive"),
        Line2D([], [], color=NEGATIVE, linewidth=1, label=f"negative (at most {NEGATIVES_SHOWN} shown)"),
        Line2D([], [], color="0.5", linewidth=1.5, linestyle=":", label="ground truth (white)"),
    ]
    figure.suptitle(title, fontsize=10)
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, path)


def _draw_image(axis: Axes, image: SampledImage, letter: str) -> None:
    height, width = image.pixels.shape[:2]
    axis.imshow(image.pixels.numpy(), extent=(0, width, height, 0), interpolation="nearest")
    negatives = image.rois[~image.is_positive]
    order = sorted(range(len(negatives)), key=lambda i: hash_integers(i))
    for i in order[:NEGATIVES_SHOWN]:
        _add_box(axis, negatives[i], NEGATIVE, 0.8, "-")
    for box in image.rois[image.is_positive]:
        _add_box(axis, box, POSITIVE, 1.4, "-")
    for box in image.truth:
        _add_box(axis, box, TRUTH, 1.4, ":")
    count, positives = len(image.rois), int(image.is_positive.sum())
    axis.set_title(f"{letter} {positives} of {count} positive ({image.ratio:.0%})", fontsize=8)
    axis.set(xlim=(-0.5, width + 0.5), ylim=(height + 0.5, -0.5))


def _add_box(axis: Axes, box: Tensor, colour: str, line: float, style: str) -> None:
    x1, y1, x2, y2 = box.tolist()
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=line, linestyle=style))
