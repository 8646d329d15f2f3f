"""From planned images to a batch: read, resize, crop, colour, flip, paste objects, place on the canvas."""

from collections.abc import Callable, Sequence
from itertools import compress

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from megdet.data.augment.partners import drawn_objects
from megdet.data.augment.pasting import NO_MASK, Prepared, pasted, put_together
from megdet.data.cache import ImageCache
from megdet.data.coco import CocoDataset
from megdet.data.draws import unit_interval
from megdet.data.far.folder import FarFolder
from megdet.data.far.opening import fetch_ahead
from megdet.data.image import read_image
from megdet.data.masks import PlacedMask, place_mask
from megdet.data.planned import PlannedImage
from megdet.data.unreadable import UnreadableImageError
from megdet.errors import InputError
from megdet.ops.boxes import box_area, clip_boxes, mirrored_boxes
from megdet.structures import Batch, Masks, Targets

_BRIGHTNESS, _CONTRAST, _SATURATION = range(11, 14)
_BOXES_MULTIPLE, _BYTES_MULTIPLE = 8, 1024
"""Targets are padded to a multiple of so many boxes, and masks to so many bytes an image, so that few shapes occur."""


def load_batch(
    dataset: CocoDataset,
    images: Sequence[PlannedImage],
    canvas: tuple[int, int],
    color_jitter: float = 0.0,
    cache: ImageCache | None = None,
) -> Batch:
    """The batch of the images of one micro-batch (there may be none) on a canvas of (height, width) pixels.

    Crowds are not targets. Targets have masks if the data set was read with masks.

    Raises UnreadableImageError for a file that cannot be read or has another size than in the plan.
    """
    # channels last, like the resized images and for the model: changing the layout costs more than resizing
    dtype = torch.float32 if any(image.resize == "torchvision" for image in images) else torch.uint8
    pixels = torch.zeros((len(images), *canvas, 3), dtype=dtype).permute(0, 3, 1, 2)
    if cache is None and isinstance(dataset.image_folder, FarFolder):
        indices = dict.fromkeys(index for image in images for index in image.indices)
        fetch_ahead([dataset.image_path(index) for index in indices])
    boxes, labels, masks = [], [], []
    for row, image in enumerate(images):
        own = _with_paste(dataset, image, color_jitter, cache)
        pixels[row, :, : image.size[0], : image.size[1]] = own.pixels
        boxes.append(own.boxes)
        labels.append(own.labels)
        masks.append(own.masks)
    most = max((len(own) for own in labels), default=0)
    width = max(_BOXES_MULTIPLE, -(-most // _BOXES_MULTIPLE) * _BOXES_MULTIPLE)
    targets = Targets(
        torch.zeros(len(images), width, 4),
        torch.full((len(images), width), -1),
        torch.tensor([image.seed for image in images], dtype=torch.int64),
        make_masks(masks, width) if dataset.has_mask_targets else None,
    )
    for row, (own_boxes, own_labels) in enumerate(zip(boxes, labels, strict=True)):
        targets.boxes[row, : len(own_boxes)] = own_boxes
        targets.labels[row, : len(own_labels)] = own_labels
    return Batch(
        pixels,
        torch.tensor([image.size for image in images], dtype=torch.int64).reshape(-1, 2),
        targets,
        tuple(image.index for image in images),
        torch.tensor([_scale(dataset, image) for image in images]).reshape(-1, 2),
    )


def make_masks(placed: Sequence[Sequence[PlacedMask]], max_boxes: int) -> Masks:
    """The masks of a batch: for each image its masks, in the order of its boxes."""
    frames = np.zeros((len(placed), max_boxes, 5), np.int64)
    packed = []
    for row, own in enumerate(placed):
        first = 0
        for column, (x, y, pixels) in enumerate(own):
            height, width = pixels.shape
            frames[row, column] = first, x, y, width, height
            first += pixels.size
        packed.append(np.packbits(np.concatenate([np.zeros(0, np.bool_), *(mask.pixels.reshape(-1) for mask in own)])))
    most = max((len(own) for own in packed), default=0)
    bits = np.zeros((len(placed), max(1, -(-most // _BYTES_MULTIPLE)) * _BYTES_MULTIPLE), np.uint8)
    for row, own_bits in enumerate(packed):
        bits[row, : len(own_bits)] = own_bits
    return Masks(torch.from_numpy(bits), torch.from_numpy(frames))


def resize(
    pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]
) -> UInt8[Tensor, "3 new_height new_width"]:
    """Bilinear with antialias, on 8-bit numbers, as PIL does it; channels last in memory."""
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    return tensor if tensor.shape[1:] == size else V.resize(tensor, list(size), antialias=True)


def resize_as_torchvision(
    pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]
) -> Float32[Tensor, "3 new_height new_width"]:
    """Bilinear without antialias, on floats from 0 to 255, as torchvision's detectors do it; channels last in memory.

    torchvision normalises before it resizes; the order matters only by rounding, since a pixel's weights sum to 1.
    """
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[0]


RESIZE: dict[str, Callable[[NDArray[np.uint8], tuple[int, int]], Tensor]] = {
    "antialias": resize,
    "torchvision": resize_as_torchvision,
}
"""The function for each value of `data.resize`."""


def _scale(dataset: CocoDataset, image: PlannedImage) -> tuple[float, float]:
    """Pixels of the resized image for one of the file, in y and x."""
    height, width = image.window.size if image.window else dataset.sizes[image.index].tolist()
    return image.resized[0] / height, image.resized[1] / width


def _with_paste(dataset: CocoDataset, image: PlannedImage, color_jitter: float, cache: ImageCache | None) -> Prepared:
    """An image or a mosaic, its targets, and what is pasted onto it."""
    with_masks = dataset.has_mask_targets or image.paste is not None
    parts = [
        (tile.corner, _prepared(dataset, tile.image, color_jitter, cache, with_masks=with_masks))
        for tile in image.tiles
    ]
    own = put_together(parts, image.size) if parts else None
    own = own or _prepared(dataset, image, color_jitter, cache, with_masks=with_masks)
    if image.paste is None:
        return own
    source = image.paste.source
    places = np.flatnonzero(~dataset.annotations[source.index].is_crowd).tolist()
    chosen = drawn_objects(source.seed, places)
    return pasted(
        own,
        _prepared(dataset, source, color_jitter, cache, with_masks=True, chosen=chosen),
        image.paste.corner,
        image.paste.least_area,
    )


def _prepared(
    dataset: CocoDataset,
    image: PlannedImage,
    color_jitter: float,
    cache: ImageCache | None,
    *,
    with_masks: bool,
    chosen: Sequence[int] | None = None,
) -> Prepared:
    """An image and its targets, crowds and what a crop leaves out excepted, or those at the `chosen` places only."""
    pixels, annotations = _load(dataset, image, color_jitter, cache), dataset.annotations[image.index]
    is_target = ~annotations.is_crowd
    if chosen is not None:
        is_target &= np.isin(np.arange(len(is_target)), chosen)
    boxes, is_left = _transform_boxes(annotations.boxes[is_target], image, torch.tensor(_scale(dataset, image)))
    is_target[is_target] = is_left.numpy()  # those that a crop keeps
    masks = _masks(dataset, image, is_target) if with_masks else []
    return Prepared(pixels, boxes[is_left], torch.from_numpy(annotations.labels[is_target]), masks)


def _load(dataset: CocoDataset, image: PlannedImage, color_jitter: float, cache: ImageCache | None) -> Tensor:
    try:
        pixels = _resized(dataset, image, cache)
    except InputError as error:
        height, width = dataset.sizes[image.index].tolist()
        reason = str(error).removeprefix(f"{dataset.image_path(image.index)}: ")
        place = "on its server" if isinstance(dataset.image_folder, FarFolder) else "in its place"
        raise UnreadableImageError(
            f"{error}: put a sound image of {width} x {height} pixels {place} and give the same command again",
            image.index,
            reason,
        ) from None
    if image.crop:
        (top, left), (height, width) = image.crop.corner, image.size
        pixels = pixels[:, top : top + height, left : left + width]
    if color_jitter:
        pixels = _jittered(pixels, image, color_jitter)
    axes = [axis for axis, flipped in ((1, image.flip_vertical), (2, image.flip_horizontal)) if flipped]
    return pixels.flip(axes) if axes else pixels


def _jittered(pixels: Tensor, image: PlannedImage, strength: float) -> Tensor:
    scale = 255.0 if pixels.is_floating_point() else 1.0  # torchvision takes floats from 0 to 1
    pixels = pixels / scale if pixels.is_floating_point() else pixels
    for purpose, adjust in (
        (_BRIGHTNESS, V.adjust_brightness),
        (_CONTRAST, adjust_contrast),
        (_SATURATION, V.adjust_saturation),
    ):
        low = max(0.0, 1 - strength)
        pixels = adjust(pixels, low + (1 + strength - low) * unit_interval(image.seed, purpose))
    return pixels * scale if pixels.is_floating_point() else pixels


def adjust_contrast(pixels: Tensor, factor: float) -> Tensor:
    """Torchvision's, with a mean that does not depend on how many threads add it up.

    Args:
        pixels: (3, height, width), 8 bits or floats from 0 to 1.
        factor: 0 makes all pixels the mean of the grey picture, 1 changes nothing.
    """
    grey = V.rgb_to_grayscale(pixels)
    unit = 1 << 24 if grey.is_floating_point() else 1  # whole numbers have one sum in any order
    total = int((grey.double() * unit).round().to(torch.int64).sum())
    mean = torch.tensor(total / (unit * grey.numel()), dtype=torch.float32)
    mixed = pixels.mul(factor).add_(mean, alpha=1 - factor)
    return mixed.clamp_(0, 1) if pixels.is_floating_point() else mixed.clamp_(0, 255).to(pixels.dtype)


def _resized(dataset: CocoDataset, image: PlannedImage, cache: ImageCache | None) -> Tensor:
    path, resize = dataset.image_path(image.index), RESIZE[image.resize]
    height, width = dataset.sizes[image.index].tolist()

    def read() -> NDArray[np.uint8]:
        return read_image(path, size=(height, width))

    def read_and_resize() -> NDArray[np.uint8]:
        return resize(read(), image.resized).permute(1, 2, 0).numpy()

    if cache is None:
        return resize(_in_window(read(), image), image.resized)
    if not cache.is_resized:
        return resize(_in_window(cache.pixels(image.index, path, "decoded", read), image), image.resized)
    kind = "resized to {}x{}".format(*image.resized)
    return torch.from_numpy(cache.pixels(image.index, path, kind, read_and_resize)).permute(2, 0, 1)


def _in_window(pixels: NDArray[np.uint8], image: PlannedImage) -> NDArray[np.uint8]:
    """The part of an image's pixels that is used."""
    if image.window is None:
        return pixels
    (top, left), (height, width) = image.window.corner, image.window.size
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def _masks(dataset: CocoDataset, image: PlannedImage, is_target: NDArray[np.bool_]) -> list[PlacedMask]:
    if dataset.annotations.segmentations is None:
        return [NO_MASK] * int(is_target.sum())
    height, width = dataset.sizes[image.index].tolist()
    own = compress(dataset.annotations.segmentations_of(image.index), is_target)
    placed = [place_mask(one, (height, width), image.resized, image.window) for one in own]
    if image.crop:
        placed = [one.cut(image.crop.corner, image.size) for one in placed]
    flips = {"horizontal": image.flip_horizontal, "vertical": image.flip_vertical}
    return [one.flipped(image.size, **flips) for one in placed]


def _transform_boxes(
    boxes: Float32[np.ndarray, "boxes 4"], image: PlannedImage, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The boxes of a file in canvas coordinates, and which have enough area left after the image was cut."""
    origin = image.window.corner if image.window else (0, 0)
    scaled = (torch.from_numpy(boxes) - torch.tensor(origin).flip(0).repeat(2)) * scale.flip(0).repeat(2)
    (height, width), whole, least = image.size, box_area(scaled), 0.0
    if image.window:
        scaled, least = clip_boxes(scaled[None], torch.tensor([image.resized]))[0], image.window.least_area
    if image.crop:
        moved = scaled - torch.tensor(image.crop.corner).flip(0).repeat(2)
        scaled, least = clip_boxes(moved[None], torch.tensor([image.size]))[0], image.crop.least_area
    left = box_area(scaled)
    is_left = (left > 0) & (left >= least * whole) if image.window or image.crop else torch.ones_like(left) > 0
    if image.flip_horizontal:
        scaled = mirrored_boxes(scaled, width)
    if image.flip_vertical:
        scaled = torch.stack([scaled[:, 0], height - scaled[:, 3], scaled[:, 2], height - scaled[:, 1]], dim=1)
    return scaled, is_left
