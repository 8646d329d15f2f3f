"""A detector in somebody else's training loop: images and targets as torchvision's detectors take them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as V

from megdet.api.images import cut_to_unit, pixels_of_any
from megdet.data.masks import PlacedMask
from megdet.data.plan import canvas_of, resized
from megdet.data.transforms import make_masks
from megdet.errors import InputError
from megdet.inference.predict import detect_images
from megdet.inference.trained import TrainedDetector
from megdet.layers.batch_norm import RUNNING_MOMENTUM, CrossDeviceBatchNorm
from megdet.ops.integer_hash import hash_integers
from megdet.precision import arithmetic
from megdet.structures import Batch, Targets

_SCALE, _IMAGE = 1, 2
"""Purposes of random numbers."""
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class TorchvisionLoop(nn.Module):
    """The network of a trained detector with the interface of torchvision's detectors.

    In training mode `model(images, targets)` returns its losses by name, each the mean over the images; their sum is
    what is to be minimised. In evaluation mode `model(images)` returns a dictionary an image: `boxes`, `labels`,
    `scores` and, where it finds them, `masks`. Images are tensors (3, height, width), of floats from 0 to 1 or of 8
    bits, of any sizes; they are resized as the recipe says, in training to one of its `data.short_edges` drawn anew in
    every forward. Boxes are x1, y1, x2, y2 in pixels of the image. Label 0 is the background, as in torchvision: class
    i of the detector is label i + 1.

    It begins in the mode of the detector, which is that of evaluation: call `train()` first.

    Nothing is flipped: that is the affair of your data set. Every forward moves the running statistics of batch norm,
    which belong to the images of one forward on one process, as in torch; `bn_size` and lanes are for `megdet.train`.

    What is drawn at random (the size, and the proposals that are learned from) follows from the number of forwards,
    which `state_dict` has, and from the `image_id` of a target, if that is a whole number, else from its place in the
    batch: a loop that goes on from its state draws what it would have drawn.

    Args:
        trained: the detector; it shares its weights, so what is learned here is what `LoadedDetector` detects with.
    """

    forwards: Tensor

    def __init__(self, trained: TrainedDetector) -> None:
        super().__init__()
        self.detector = trained.model
        self._trained = trained
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        for module in self.detector.modules():
            if isinstance(module, CrossDeviceBatchNorm):
                module.fold_momentum = RUNNING_MOMENTUM
        self.train(trained.model.training)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Float[Tensor, ""]] | list[dict[str, Tensor]]:
        """Losses in training mode, detections in evaluation mode.

        Raises InputError for an image or a target that cannot be meant; it names the place of the image in the batch.
        """
        if not self.training:
            pixels = [pixels_of_any(image, self._trained.recipe.data.max_pixels).values for image in images]
            return [
                {name: own.to(image.device) for name, own in found.to_torchvision().items()}
                for image, found in zip(images, detect_images(self._trained, pixels), strict=True)
            ]
        if targets is None or len(targets) != len(images) or not len(images):
            raise InputError("training needs images, and one target each: a dictionary with boxes and labels")
        batch = self._batch(images, targets)
        with arithmetic(self._trained.recipe.precision, batch.pixels.device):
            found = self.detector(batch)
        return {name: found[name].mean() for name in self.detector.loss_names}

    def _batch(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> Batch:
        recipe, device = self._trained.recipe, next(self.detector.parameters()).device
        self.forwards += 1
        data, forward = recipe.data, int(self.forwards)
        edge = data.short_edges[hash_integers(recipe.seed, _SCALE, forward) % len(data.short_edges)]
        own = [_checked(place, *pair) for place, pair in enumerate(zip(images, targets, strict=True))]
        sizes = [resized(image.shape[1], image.shape[2], edge, data.max_long_edge, data.resize) for image, _ in own]
        canvas = canvas_of((max(h for h, _ in sizes), max(w for _, w in sizes)), data)
        pixels = torch.zeros(len(own), 3, *canvas, device=device)
        scales = torch.tensor([[h / i.shape[1], w / i.shape[2]] for (h, w), (i, _) in zip(sizes, own, strict=True)])
        most = max(1, *(len(target["labels"]) for _, target in own))
        boxes, labels = torch.zeros(len(own), most, 4), torch.full((len(own), most), -1)
        masks: list[list[PlacedMask]] = []
        for row, ((image, target), size) in enumerate(zip(own, sizes, strict=True)):
            small = V.resize(image.to(device), list(size), antialias=data.resize == "antialias")
            pixels[row, :, : size[0], : size[1]] = small * (1 if small.dtype == torch.uint8 else 255)
            count = len(target["labels"])
            boxes[row, :count] = target["boxes"].float().cpu() * scales[row].flip(0).repeat(2)
            labels[row, :count] = target["labels"].cpu() - 1
            if self.detector.has_masks:
                masks.append([_placed(mask, size) for mask in _masks(row, image, target)])
        top = int(labels.max())
        if top >= self.detector.num_classes:
            raise InputError(f"label {top + 1} is more than the {self.detector.num_classes} classes of the detector")
        numbers = [_number_of(row, target) for row, (_, target) in enumerate(own)]
        seeds = [hash_integers(recipe.seed, _IMAGE, forward, number) for number in numbers]
        made = make_masks(masks, most) if self.detector.has_masks else None
        return Batch(
            pixels,
            torch.tensor(sizes),
            Targets(boxes, labels, torch.tensor(seeds), made),
            tuple(range(len(own))),
            scales,
        ).to(device)


def _number_of(row: int, target: Mapping[str, Any]) -> int:
    """What tells an image from others: a whole `image_id` of its target, else its row in the batch."""
    own = target.get("image_id")
    if isinstance(own, Tensor) and own.numel() == 1 and own.dtype in _WHOLE:
        return int(own)
    return own if isinstance(own, int) else row


def _checked(place: int, image: Tensor, target: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """An image, its floats from 0 to 1, and its target."""
    where = f"image {place} of the batch"
    if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
        raise InputError(f"{where}: a tensor (3, height, width) is needed, not {tuple(image.shape)}")
    if image.is_floating_point():
        image = cut_to_unit(image, where)
    elif image.dtype != torch.uint8:
        raise InputError(f"{where}: floats from 0 to 1 or 8 bits (torch.uint8) are needed, not {image.dtype}")
    if missing := next((name for name in ("boxes", "labels") if name not in target), None):
        raise InputError(f"{where}: its target has no '{missing}'")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise InputError(
            f"{where}: boxes are (n, 4) and labels (n,), not {tuple(boxes.shape)} and {tuple(labels.shape)}"
        )
    if labels.dtype not in _WHOLE:
        raise InputError(f"{where}: labels are whole numbers, such as torch.int64, not {labels.dtype}")
    if not bool(torch.isfinite(boxes).all() & (boxes[:, 2:] > boxes[:, :2]).all()):
        raise InputError(f"{where}: boxes are x1, y1, x2, y2 with x1 < x2 and y1 < y2")
    edges = torch.tensor([image.shape[2], image.shape[1]], device=boxes.device)
    if not bool((boxes[:, :2] < edges).all() & (boxes[:, 2:] > 0).all()):
        raise InputError(
            f"{where}: a box has no part in the image of {image.shape[2]} x {image.shape[1]}: boxes are in its pixels"
        )
    if len(labels) and int(labels.min()) < 1:
        raise InputError(f"{where}: labels begin at 1, 0 is the background")
    return image, target


def _masks(place: int, image: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    wanted = (len(target["labels"]), *image.shape[1:])
    if "masks" not in target or tuple(target["masks"].shape) != wanted:
        raise InputError(
            f"image {place} of the batch: its target needs 'masks' {wanted}, an object each, of the height and width "
            "of the image: it learns from them"
        )
    return target["masks"]


def _placed(mask: Tensor, size: tuple[int, int]) -> PlacedMask:
    """A mask at the size of the resized image, in the smallest frame around its pixels."""
    soft = V.resize(mask[None].float().cpu(), list(size), antialias=True)[0]
    pixels = soft.numpy() >= 0.5
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    if not len(rows):
        return PlacedMask(0, 0, np.zeros((0, 0), np.bool_))
    top, left = int(rows[0]), int(columns[0])
    return PlacedMask(left, top, pixels[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1])
