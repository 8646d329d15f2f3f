"""Training images with their boxes as the model got them: resized, flipped and cropped."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from megdet.data.coco import CocoDataset
from megdet.inference.draw import draw_detections
from megdet.plotting import write_picture
from megdet.structures import Batch


def draw_images(batches: Sequence[Batch], dataset: CocoDataset, chosen: Collection[int | str], out: Path) -> list[Path]:
    """Draw the chosen images of some batches into a folder; returns the paths of the pictures. Raises InputError."""
    paths = []
    for batch in batches:
        for row, index in enumerate(batch.image_index):
            if dataset.image_ids[index] in chosen:
                path = out / f"image_{re.sub(r'[^0-9A-Za-z_-]', '_', str(dataset.image_ids[index]))}.png"
                _draw(batch, row, dataset, path)
                paths.append(path)
    return paths


def _draw(batch: Batch, row: int, dataset: CocoDataset, path: Path) -> None:
    height, width = batch.sizes[row].tolist()
    pixels = batch.pixels[row, :, :height, :width].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
    targets, is_box = batch.targets, batch.targets.is_box[row]
    labels = targets.labels[row][is_box].tolist()
    boxes = targets.boxes[row][is_box].double().numpy()
    names = [dataset.class_names[label] for label in labels]
    picture = draw_detections(pixels.numpy(), boxes, names, class_indices=labels)
    write_picture(path, lambda file: picture.save(file, "png"))
