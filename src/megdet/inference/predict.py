"""Detections of whole data sets and of single images."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megdet.data.coco import CocoDataset
from megdet.data.image import read_image
from megdet.data.loader import group_batches
from megdet.data.plan import canvas_of, evaluation_plan, evaluation_scales, evaluation_size
from megdet.data.rle import encode_mask
from megdet.data.transforms import RESIZE
from megdet.distributed.world import World
from megdet.errors import InputError, nearest
from megdet.inference.looks import mirrored_detections, mirrored_pixels, together, within
from megdet.inference.trained import TrainedDetector
from megdet.model.detector import Detector
from megdet.ops.masks import paste_masks
from megdet.precision import arithmetic
from megdet.recipe import Precision, Recipe
from megdet.structures import BatchDetections

Result = dict[str, Any]
"""One detection in the COCO result format: image_id, category_id, bbox (x, y, width, height in pixels), score, and
segmentation (`data.rle`) where the detector finds masks."""


def category_ids_for(class_names: Sequence[str], dataset: CocoDataset) -> list[int | None]:
    """The data set's category id of each of the detector's classes, matched by name; None where it has no such class.

    Raises InputError when the data set has a class that the detector does not know, or two of one name that it does
    not have in the same order.
    """
    if tuple(class_names) == dataset.class_names:
        return list(dataset.category_ids)
    ids = dict(zip(dataset.class_names, dataset.category_ids, strict=True))
    unknown = [name for name in ids if name not in class_names]
    if unknown:
        raise InputError(
            f"{dataset.annotations_file}: class '{unknown[0]}' is not among the detector's {len(class_names)} classes"
            f"{nearest(unknown[0], class_names)}"
        )
    twice = next((name for name in ids if max(class_names.count(name), dataset.class_names.count(name)) > 1), None)
    if twice is not None:
        raise InputError(f"{dataset.annotations_file}: more than one class is called '{twice}', so names do not tell")
    return [ids.get(name) for name in class_names]


def detect_dataset(
    model: Detector,
    recipe: Recipe,
    dataset: CocoDataset,
    category_ids: Sequence[int | None],
    world: World,
    *,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """All detections of a data set in the order of the evaluation plan, the same on any number of ranks.

    Rank r takes whole batches r, r + W, ... with all looks at them; every rank gets the merged list. `category_ids` are
    those of the model's labels; detections of a label without one are left out. `progress` is called with the images
    done on this rank.
    """
    plan, num_scales = evaluation_plan(dataset.sizes, recipe), len(evaluation_scales(recipe))
    mine = range(world.rank, len(plan) // num_scales, world.size)
    model.eval()
    found: list[tuple[int, list[Result]]] = []
    groups = [plan[number * num_scales + scale] for number in mine for scale in range(num_scales)]
    batches = group_batches(dataset, groups, workers=workers, device=world.device)
    done, looks = 0, list[BatchDetections]()
    for (number, scale), batch in zip(itertools.product(mine, range(num_scales)), batches, strict=True):
        batch = batch.to(world.device)
        looks += _looks(model, recipe, scale, batch.pixels, batch.sizes, batch.scales)
        if scale < num_scales - 1:
            continue
        detections, looks = together(looks, recipe.evaluation), []
        results = []
        for row, index in enumerate(batch.image_index):
            height, width = dataset.sizes[index].tolist()
            own = detections[row : row + 1]
            results += _results(own, (height, width), dataset.image_ids[index], category_ids, exact=model.exact_paste)
        found.append((number, results))
        done += len(batch.image_index)
        if progress is not None:
            progress(done)
    merged = sorted((item for part in world.gather_objects(found) for item in part), key=lambda item: item[0])
    return [result for _, results in merged for result in results]


def detect_image(trained: TrainedDetector, file: Path) -> tuple[NDArray[np.uint8], list[Result]]:
    """The 8-bit RGB pixels of an image file and its detections, with `image_id` the file's name.

    They are those of `detect_dataset` to rounding: the canvas is that of the evaluation plan.
    """
    data = trained.recipe.data
    pixels = read_image(file, max_pixels=data.max_pixels)
    height, width = pixels.shape[:2]
    looks = []
    for scale, edge in enumerate(evaluation_scales(trained.recipe)):
        size = evaluation_size(height, width, data, edge)
        resized = RESIZE[data.resize](pixels, size)
        canvas = torch.zeros(1, 3, *canvas_of(size, data), dtype=resized.dtype)
        canvas[0, :, : size[0], : size[1]] = resized
        sizes = torch.tensor([size], device=trained.device)
        scales = torch.tensor([[size[0] / height, size[1] / width]])
        looks += _looks(trained.model, trained.recipe, scale, canvas.to(trained.device), sizes, scales)
    found = together(looks, trained.recipe.evaluation)
    exact = trained.model.exact_paste
    return pixels, _results(found, (height, width), file.name, trained.category_ids, exact=exact)


def detect_batch(model: Detector, pixels: Tensor, sizes: Tensor, precision: Precision) -> BatchDetections:
    """Detections of one batch on the model's device, in the precision of its recipe."""
    with torch.inference_mode(), arithmetic(precision, pixels.device):
        return model.detect(model.normalized(pixels, sizes), sizes)


def _looks(
    model: Detector, recipe: Recipe, scale: int, pixels: Tensor, sizes: Tensor, scales: Tensor
) -> list[BatchDetections]:
    """What is found in a batch at one of the scales, and in the mirrored batch if asked for; boxes as in the files."""
    found = [detect_batch(model, pixels, sizes, recipe.precision)]
    if recipe.evaluation.flip:
        mirrored = detect_batch(model, mirrored_pixels(pixels, sizes), sizes, recipe.precision)
        found.append(mirrored_detections(mirrored, sizes))
    found = [_at_file_size(look, scales) for look in found]
    ranges = recipe.evaluation.object_ranges
    return [within(look, ranges[scale]) for look in found] if ranges else found


def _at_file_size(detections: BatchDetections, scales: Tensor) -> BatchDetections:
    """The same on the CPU, boxes in pixels of the files; `scales` are those of a `Batch`."""
    edges = scales.double().cpu().flip(1).repeat(1, 2).unsqueeze(1)
    return replace(detections.map(Tensor.cpu), boxes=detections.boxes.double().cpu() / edges)


def _results(
    detections: BatchDetections,
    size: tuple[int, int],
    image_id: int | str,
    category_ids: Sequence[int | None],
    *,
    exact: bool,
) -> list[Result]:
    """The detections of one image of this height and width in pixels; `exact` is that of `paste_masks`."""
    boxes, scores, labels = detections.boxes[0], detections.scores[0], detections.labels[0].tolist()
    kept = [row for row, label in enumerate(labels) if label >= 0 and category_ids[label] is not None]
    results = [
        {
            "image_id": image_id,
            "category_id": category_ids[labels[row]],
            "bbox": [round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)],
            "score": round(score, 6),
        }
        for row, (x1, y1, x2, y2), score in zip(kept, boxes[kept].tolist(), scores[kept].tolist(), strict=True)
    ]
    if detections.masks is not None:
        nothing = encode_mask(np.zeros((0, 0), np.bool_), 0, 0, size)
        results = [result | {"segmentation": nothing} for result in results]
        for mask in paste_masks(detections.masks[0, kept].float(), boxes[kept], size, exact=exact):
            results[mask.index]["segmentation"] = encode_mask(mask.pixels.numpy(), mask.x, mask.y, size)
    return results
