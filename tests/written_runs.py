"""Run folders as a training leaves them, written without training: known detections on drawn images."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megdet.architecture import FasterRcnn
from megdet.data.coco import write_coco
from megdet.data.rle import encode_mask
from megdet.evaluation.coco_numbers import evaluate_files
from megdet.files import write_json_atomically
from megdet.recipe import Data, Optimizer, Recipe, Schedule
from megdet.recipe_file import dump_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter

CLASS_NAMES = ("bolt", "nut", "gear")


def write_validation_set(
    folder: Path, images: int = 24, class_names: tuple[str, ...] = CLASS_NAMES, seed: int = 0
) -> Path:
    """Grey images of 96 x 64 pixels with one to three bright boxes each; returns the annotations."""
    random = np.random.default_rng(seed)
    (folder / "val").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        pixels = np.full((64, 96, 3), 60, np.uint8)
        for place in range(random.integers(1, 4)):
            x, y, width, height = 32 * place + 2, int(random.integers(2, 30)), 26, int(random.integers(20, 30))
            label = int(random.integers(len(class_names)))
            pixels[y : y + height, x : x + width] = (90 + 60 * (label % 3), 200, 120)
            row = {"id": len(rows) + 1, "image_id": image, "category_id": label + 1, "iscrowd": 0}
            rows.append(row | {"bbox": [x, y, width, height], "area": width * height})
        Image.fromarray(pixels).save(folder / "val" / f"{image}.jpg")
    path = folder / "val.json"
    write_coco(
        path,
        images=[{"id": i, "file_name": f"{i}.jpg", "width": 96, "height": 64} for i in range(1, images + 1)],
        annotations=rows,
        categories=[{"id": i, "name": name} for i, name in enumerate(class_names, 1)],
    )
    return path


def noisy_detections(annotations: Path, error: float, seed: int = 0) -> list[dict[str, Any]]:
    """The ground truth moved by about `error` pixels, some missed or of a wrong class, and boxes where nothing is."""
    random = np.random.default_rng(seed)
    document = json.loads(annotations.read_text())
    count = len(document["categories"])
    found = []
    for row in document["annotations"]:
        if random.random() < 0.1:
            continue
        label = row["category_id"] if random.random() < 0.9 else 1 + row["category_id"] % count
        box = [round(value, 2) for value in (np.array(row["bbox"]) + random.normal(0, error, 4)).clip(1).tolist()]
        score = round(float(random.uniform(0.4, 1.0)), 4)
        found.append({"image_id": row["image_id"], "category_id": label, "bbox": box, "score": score})
        if random.random() < 0.3:
            nothing = {"bbox": [1.0, 1.0, 9.0, 9.0], "score": round(float(random.uniform(0.05, 0.6)), 4)}
            found.append({"image_id": row["image_id"], "category_id": label} | nothing)
    return found


def written_recipe(annotations: Path, **keys: Any) -> Recipe:
    """Two epochs of 32 images, 8 a step, with one decay."""
    data = Data(val_annotations=str(annotations), val_images=str(annotations.parent / "val"))
    schedule = Schedule(policy="step", epochs=2.0, milestones=(1.5,), factors=(0.1,), warmup_steps=2)
    return replace(Recipe(batch_size=8, bn_size=8, data=data, schedule=schedule, model=FasterRcnn()), **keys)


def with_masks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, each with a mask of the upper half of its box."""
    masked = []
    for row in rows:
        x, y, width, height = (round(value) for value in row["bbox"])
        pixels = np.ones((max(1, min(height // 2, 63 - y)), max(1, min(width, 95 - x))), np.bool_)
        masked.append(row | {"segmentation": encode_mask(pixels, x, y, (64, 96))})
    return masked


def write_run(
    path: Path, annotations: Path, *, error: float = 1.0, detections_seed: int = 0, base_lr: float = 0.02, seed: int = 0
) -> RunFolder:
    """A finished run of eight steps and two evaluations whose detections are `noisy_detections`."""
    folder = RunFolder(path).create()
    folder.write_recipe(dump_recipe(written_recipe(annotations, optimizer=Optimizer(base_lr=base_lr), seed=seed)))
    write_json_atomically(folder.detections, noisy_detections(annotations, error, detections_seed))
    numbers = evaluate_files(annotations, folder.detections)
    write_json_atomically(folder.evaluation, numbers.as_dict())
    session = {"started_utc": "2026-01-02T03:04:05+00:00", "world_size": 1, "device": "cpu", "devices": []}
    session |= {"cpu": {"model": "a processor", "cores": 2, "memory_bytes": 8 << 30}, "host": "here"}
    session |= {
        "versions": {"megdet": "0.1.0", "torch": "2.11"},
        "training": {"positive_out_of": {"rpn_positive": 256, "box_head_positive": 1}},
        "command": "megdet train",
        "system": "Linux",
    }
    write_json_atomically(folder.environment, {"sessions": [session]})
    write_metrics(folder, numbers.totals())
    return folder


def write_metrics(folder: RunFolder, numbers: dict[str, Any]) -> None:
    """Eight steps of a second each, an evaluation of two seconds after each four."""
    with MetricsWriter(folder.metrics) as metrics:
        for step in range(1, 9):
            line = {"step": step, "epoch": step / 4, "learning_rate": 0.01 if step <= 6 else 0.001, "loss": 2.0 / step}
            line |= {"rpn_objectness": 0.5 / step, "rpn_box": 0.5 / step, "box_head_class": 0.5 / step}
            line |= {"box_head_box": 0.5 / step, "rpn_positive": 4.0, "box_head_positive": 0.1, "gradient_norm": 1.0}
            metrics.write(line | {"seconds": 1.0, "data_seconds": 0.1})
            if step % 4 == 0:
                metrics.write({"step": step, "evaluation": numbers, "seconds": 2.0})
