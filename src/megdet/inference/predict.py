"""Detections of whole data sets and of single images."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megdet.data.coco import CocoDataset
from megdet.data.far.folder import ImageFile
from megdet.data.image import read_image
from megdet.data.loader import group_batches
from megdet.data.plan import evaluation_plan, evaluation_scales
from megdet.data.rle import encode_mask
from megdet.data.transforms import RESIZE
from megdet.detections import Detections
from megdet.distributed.world import World
from megdet.errors import TooLittleMemoryError
from megdet.inference.evaluating import evaluating
from megdet.inference.looks import mirrored_detections, mirrored_pixels, together, within
from megdet.inference.side_by_side import given_up_early, shares, side_by_side, threads_for
from megdet.inference.trained import TrainedDetector
from megdet.memory import is_out_of_memory, return_freed_memory
from megdet.model.detector import Detector
from megdet.ops.masks import paste_masks
from megdet.precision import arithmetic, tf32_flags
from megdet.recipe import Precision, Recipe
from megdet.runtime import operations_on_one_thread, usable_threads
from megdet.structures import Batch, BatchDetections

_Detect: TypeAlias = Callable[[Detector, Tensor, Tensor, Precision], BatchDetections]
Result = dict[str, Any]
"""One detection in the COCO result format: image_id, category_id, bbox (x, y, width, height in pixels), score, and
segmentation (`data.rle`) if the detector finds masks."""


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
    """All detections of a data set in the order of the evaluation plan, the same in every bit on any number of ranks.

    Rank r takes whole batches r, r + W, ... at all scales; every rank gets the merged list. On a CPU the images of a
    batch are computed side by side (`side_by_side.py`). `category_ids` are the ids of the model's labels; detections of
    a label without an id are left out. `progress` is called with the number of images done on this rank.

    Raises InputError where an image cannot be read, and TooLittleMemoryError.
    """
    plan, num_scales = evaluation_plan(dataset.sizes, recipe), len(evaluation_scales(recipe))
    groups = [plan[first : first + num_scales] for first in range(0, len(plan), num_scales)][world.rank :: world.size]
    loaded = group_batches(dataset, list(itertools.chain(*groups)), workers=workers, device=world.device)
    is_cpu = world.device.type == "cpu"

    def pieces() -> Iterator[tuple[int, list[Batch]]]:
        for number, scales in enumerate(groups):
            batches = list(itertools.islice(loaded, num_scales))
            canvas = max((group.canvas for group in scales), key=math.prod)
            for images in shares(len(scales[0].images), canvas) if is_cpu else [slice(None)]:
                yield number, [batch[images] for batch in batches]
        next(loaded, None)  # so that loading processes end

    def detected(piece: tuple[int, list[Batch]]) -> tuple[int, list[list[Result]]]:
        number, batches = piece
        looks: list[BatchDetections] = []
        for scale, batch in enumerate(own.to(world.device) for own in batches):
            looks += _looks(_detect, model, recipe, scale, batch.pixels, batch.sizes, batch.scales)
        detections, images = together(looks, recipe.evaluation), []
        for row, index in enumerate(batches[0].image_index):
            height, width = dataset.sizes[index].tolist()
            own = detections_of_image(detections[row : row + 1], (height, width), exact=model.exact_paste)
            images.append(own.to_coco(dataset.image_ids[index], category_ids))
        return world.rank + number * world.size, images

    found, done = list[tuple[int, list[Result]]](), 0
    with ExitStack() as opened:
        opened.enter_context(_told_of_memory(recipe.evaluation.batch_size, world.device))
        opened.enter_context(evaluating(model))
        opened.enter_context(tf32_flags(recipe.precision))
        if recipe.exact:
            opened.enter_context(operations_on_one_thread())
        threads = 0
        if is_cpu and groups:
            largest = max((own.canvas for scales in groups for own in scales), key=math.prod)
            threads = threads_for(largest, recipe.evaluation.batch_size)
            opened.callback(return_freed_memory)  # the threads have taken it for themselves
            opened.enter_context(given_up_early(model))
        for number, images in opened.enter_context(closing(side_by_side(detected, pieces(), threads))):
            found.append((number, list(itertools.chain(*images))))
            done += len(images)
            if progress is not None:
                progress(done)
    merged = sorted((item for part in world.gather_objects(found) for item in part), key=lambda item: item[0])
    return [result for _, results in merged for result in results]


@contextmanager
def _told_of_memory(batch_size: int, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fewer = ", or give fewer threads (OMP_NUM_THREADS)" if device.type == "cpu" else ""  # each computes a share
        raise TooLittleMemoryError(
            f"memory does not suffice for {batch_size} images at a time on {device}: lower evaluation.batch_size{fewer}"
        ) from None


def detect_images(trained: TrainedDetector, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
    """The detections of images, each (height, width, 3) RGB of 8 bits, in the same order.

    They are those of `detect_dataset` up to rounding, with canvases and scales of the evaluation plan. Up to
    `evaluation.batch_size` images of one canvas make a batch.
    """
    recipe, found = trained.recipe, dict[int, Detections]()
    device = next(trained.model.parameters()).device  # a loop of the user's own may have moved it
    heights_widths = np.array([pixels.shape[:2] for pixels in images], dtype=np.int64).reshape(-1, 2)
    plan, num_scales = evaluation_plan(heights_widths, recipe), len(evaluation_scales(recipe))
    for first in range(0, len(plan), num_scales):
        looks: list[BatchDetections] = []
        for scale, group in enumerate(plan[first : first + num_scales]):
            resized = [RESIZE[image.resize](images[image.index], image.size) for image in group.images]
            canvas = torch.zeros(len(resized), 3, *group.canvas, dtype=resized[0].dtype)
            for row, small in enumerate(resized):
                canvas[row, :, : small.shape[1], : small.shape[2]] = small
            sizes = torch.tensor([image.size for image in group.images])
            scales = sizes / torch.from_numpy(heights_widths[[image.index for image in group.images]])
            moved = canvas.to(device), sizes.to(device)
            looks += _looks(detect_batch, trained.model, recipe, scale, *moved, scales)
        merged = together(looks, recipe.evaluation)
        for row, image in enumerate(plan[first].images):
            height, width = heights_widths[image.index].tolist()
            own = detections_of_image(merged[row : row + 1], (height, width), exact=trained.model.exact_paste)
            names, ids, pixels = trained.class_names, trained.category_ids, images[image.index]
            found[image.index] = replace(own, class_names=names, category_ids=ids, pixels=pixels)
    return [found[index] for index in range(len(images))]


def detect_image(trained: TrainedDetector, file: ImageFile) -> Detections:
    """The detections of an image file. Raises InputError."""
    pixels = read_image(file, max_pixels=trained.recipe.data.max_pixels)
    return replace(*detect_images(trained, [pixels]), source=str(file))


def detect_batch(model: Detector, pixels: Tensor, sizes: Tensor, precision: Precision) -> BatchDetections:
    """Detections of one batch on the model's device, in the precision of its recipe, as in evaluation mode.

    On a CPU the shares of a batch are computed side by side if there is one for every thread; else every operation uses
    all threads.
    """
    own = shares(len(pixels), (pixels.shape[2], pixels.shape[3])) if pixels.device.type == "cpu" else []
    if len(own) < max(2, usable_threads()):
        return _detect(model, pixels, sizes, precision)
    with evaluating(model), tf32_flags(precision):
        works = ((pixels[images], sizes[images]) for images in own)
        found = side_by_side(lambda work: _detect(model, *work, precision), works, usable_threads())
        return BatchDetections.of_batches(list(found))


def _detect(model: Detector, pixels: Tensor, sizes: Tensor, precision: Precision) -> BatchDetections:
    with torch.inference_mode(), arithmetic(precision, pixels.device), evaluating(model):
        return model.detect(model.normalized(pixels, sizes), sizes)


def _looks(
    detect: _Detect, model: Detector, recipe: Recipe, scale: int, pixels: Tensor, sizes: Tensor, scales: Tensor
) -> list[BatchDetections]:
    """The detections of a batch at one scale, and of the mirrored batch if asked for; boxes in pixels of the files."""
    found = [detect(model, pixels, sizes, recipe.precision)]
    if recipe.evaluation.flip:
        mirrored = detect(model, mirrored_pixels(pixels, sizes), sizes, recipe.precision)
        found.append(mirrored_detections(mirrored, sizes))
    found = [at_file_size(look, scales) for look in found]
    ranges = recipe.evaluation.object_ranges
    return [within(look, ranges[scale]) for look in found] if ranges else found


def at_file_size(detections: BatchDetections, scales: Tensor) -> BatchDetections:
    """The detections on the CPU, with boxes in pixels of the files; `scales` are those of a `Batch`."""
    edges = scales.double().cpu().flip(1).repeat(1, 2).unsqueeze(1)
    return replace(detections.map(Tensor.cpu), boxes=detections.boxes.double().cpu() / edges)


def detections_of_image(found: BatchDetections, size: tuple[int, int], *, exact: bool) -> Detections:
    """The detections of one image of this height and width in pixels, without names; `exact` as in `paste_masks`."""
    rows = found.labels[0] >= 0
    boxes, masks = found.boxes[0, rows], None
    if found.masks is not None:
        placed = [encode_mask(np.zeros((0, 0), np.bool_), 0, 0, size)] * len(boxes)
        for mask in paste_masks(found.masks[0, rows].float(), boxes, size, exact=exact):
            placed[mask.index] = encode_mask(mask.pixels.numpy(), mask.x, mask.y, size)
        masks = tuple(placed)
    scores, labels = found.scores[0, rows].double().numpy(), found.labels[0, rows].numpy()
    return Detections(boxes.double().numpy(), scores, labels, (), (), size, masks)
