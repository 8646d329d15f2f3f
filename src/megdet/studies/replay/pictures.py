"""Training images with their boxes as the model got them: resized, flipped and cropped."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from megdet.data.coco import CocoDataset
from megdet.drawing import draw_detections
from megdet.files import write_picture
from megdet.structures import Batch
from megdet.studies.replay.look import Forward


def draw_images(
    forwards: Sequence[Forward], dataset: CocoDataset, chosen: Collection[int | str], out: Path
) -> list[Path]:
    """Draw the images of these ids into a folder; returns the paths of the pictures.

    A step in which an epoch ends may have an image twice, so file names have its index too. Raises InputError.
    """
    paths = []
    for forward in forwards:
        for row, index in enumerate(forward.batch.image_index):
            if dataset.image_ids[index] in chosen:
                name = re.sub(r"[^0-9A-Za-z_-]", "_", str(dataset.image_ids[index]))
                paths.append(out / f"group_{forward.group}_{forward.places[row]}_image_{name}.png")
                _draw(forward.batch, row, dataset, paths[-1])
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
