"""The COCO numbers of many detections: ours beside pycocotools, each in a process of its own, in turn.

    python bench/evaluation.py --images 5000 --detections 500000
    python bench/evaluation.py --images 5000 --detections 100000 --kind segm

Both sides read the same two files, of a drawn set like COCO: 80 classes (V3Det has 13,204), some 7 boxes an image,
detections near the boxes and far from them. With `--kind segm` the objects are ellipses: polygons in the ground truth,
run lengths in the detections, which have no boxes; ours counts the boxes around them as well. Prints the seconds from
the files to the numbers, the ratio and each process's peak memory.
"""

import argparse
import contextlib
import io
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
TRUTH, FOUND = "truth.json", "detections.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=500_000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--kind", choices=["bbox", "segm"], default="bbox", help="what overlaps: boxes or masks")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--task", choices=["draw", "pycocotools", "megdet"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task == "draw":
        draw(options.folder, options.images, options.detections, options.classes, options.kind)
    elif options.task:
        print(json.dumps(run(options.task, options.folder, options.kind)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            # this process stays small: a child's peak counts from the memory of its parent
            child(options, "draw", folder)
            results: dict[str, list[dict[str, Any]]] = {"pycocotools": [], "megdet": []}
            for _ in range(options.rounds):
                for side, runs in results.items():
                    runs.append(json.loads(child(options, side, folder)))
        report(options, results)


def child(options: argparse.Namespace, task: str, folder: str) -> str:
    command = [sys.executable, __file__, "--task", task, "--folder", folder]
    for key in ("images", "detections", "classes", "kind"):
        command += [f"--{key}", str(getattr(options, key))]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def run(side: str, folder: Path, kind: str) -> dict[str, Any]:
    """Seconds of the clock and of the processor, peak memory of the process in bytes and the twelve numbers."""
    evaluate = with_pycocotools if side == "pycocotools" else with_megdet
    before = peak()
    started, worked = time.perf_counter(), time.process_time()
    numbers = evaluate(folder, kind)
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - worked,
        "peak_bytes": peak(),
        "peak_bytes_before": before,
        "numbers": numbers,
    }


def peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def with_pycocotools(folder: Path, kind: str) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / TRUTH))
        evaluation = COCOeval(truth, truth.loadRes(str(folder / FOUND)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers: list[float] = evaluation.stats.tolist()
    return numbers


def with_megdet(folder: Path, kind: str) -> list[float]:
    from megdet.evaluation.coco_numbers import evaluate_files

    numbers = evaluate_files(folder / TRUTH, folder / FOUND).as_dict()[kind]
    return [numbers[key] for key in KEYS]


def draw(folder: Path, num_images: int, num_detections: int, num_classes: int, kind: str) -> None:
    """A set whose classes are as uneven as in nature; half of the detections are near a box."""
    import numpy as np

    random = np.random.default_rng(0)
    frequency = 1 / np.arange(1, num_classes + 1)
    frequency /= frequency.sum()

    def sides(count: int) -> Any:
        return np.exp(random.uniform(np.log(8), np.log(300), (count, 2)))

    counts = random.poisson(7, num_images)
    owner = np.repeat(np.arange(num_images), counts)
    total = len(owner)
    size = sides(total)
    corner = random.uniform(0, 1, (total, 2)) * np.maximum(np.array([640, 480]) - size, 1)
    label = random.choice(num_classes, total, p=frequency)
    area = size.prod(axis=1) * random.uniform(0.4, 1, total)
    boxes = np.concatenate([corner, size], axis=1).round(2).tolist()
    truth = {
        "images": [{"id": 3 * i + 1, "width": 640, "height": 480} for i in range(num_images)],
        "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(num_classes)],
        "annotations": [
            {"id": i + 1, "image_id": 3 * image + 1, "category_id": c + 1, "bbox": box, "area": a, "iscrowd": crowd}
            for i, (image, c, box, a, crowd) in enumerate(
                zip(
                    *(owner.tolist(), label.tolist(), boxes, area.tolist()),
                    (random.random(total) < 0.01).astype(int).tolist(),
                    strict=True,
                )
            )
        ],
    }
    if kind == "segm":
        for annotation in truth["annotations"]:
            outline = ellipse(annotation["bbox"])
            annotation["segmentation"] = run_lengths(outline) if annotation["iscrowd"] else [outline]
    (folder / TRUTH).write_text(json.dumps(truth))

    image = np.sort(random.integers(0, num_images, num_detections))
    is_near = (random.random(num_detections) < 0.5) & (counts[image] > 0)
    first = np.cumsum(counts) - counts
    near = np.minimum(first[image] + (random.random(num_detections) * counts[image]).astype(int), total - 1)
    moved = corner[near] + random.normal(0, 0.08, (num_detections, 2)) * size[near]
    scaled = size[near] * np.exp(random.normal(0, 0.15, (num_detections, 2)))
    far = random.uniform(0, 1, (num_detections, 2)) * np.array([640, 480])
    where = np.where(is_near[:, None], moved, far)
    extent = np.where(is_near[:, None], scaled, sides(num_detections))
    keeps_class = is_near & (random.random(num_detections) < 0.8)
    found = np.where(keeps_class, label[near], random.choice(num_classes, num_detections, p=frequency))
    score = np.where(is_near, random.beta(2, 3, num_detections), random.beta(1, 6, num_detections)).clip(1e-3, 1)
    boxes = np.concatenate([where, extent], axis=1).round(3).tolist()
    detections = [
        {"image_id": 3 * i + 1, "category_id": c + 1, "bbox": box, "score": s}
        for i, c, box, s in zip(image.tolist(), found.tolist(), boxes, score.round(6).tolist(), strict=True)
    ]
    if kind == "segm":
        for detection in detections:
            detection["segmentation"] = run_lengths(ellipse(detection.pop("bbox")))
    (folder / FOUND).write_text(json.dumps(detections))


def ellipse(box: list[float]) -> list[float]:
    """The outline of the ellipse in a box, cut at the image."""
    x, y, width, height = box
    angles = [step * math.pi / 12 for step in range(24)]
    points = ((x + width / 2 * (1 + math.cos(a)), y + height / 2 * (1 + math.sin(a))) for a in angles)
    return [edge for px, py in points for edge in (min(max(px, 0.0), 640.0), min(max(py, 0.0), 480.0))]


def run_lengths(outline: list[float]) -> dict[str, Any]:
    from hotcoco import mask

    (painted,) = mask.frPyObjects([outline], 480, 640)
    return {"size": [480, 640], "counts": painted["counts"].decode()}


def report(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    median = {
        side: {
            key: statistics.median(one[key] for one in runs) for key in ("seconds", "processor_seconds", "peak_bytes")
        }
        for side, runs in results.items()
    }
    clock = {side: [one["seconds"] for one in runs] for side, runs in results.items()}
    ratios = [reference / ours for reference, ours in zip(clock["pycocotools"], clock["megdet"], strict=True)]
    numbers = {side: runs[0]["numbers"] for side, runs in results.items()}
    difference = max(abs(a - b) for a, b in zip(*numbers.values(), strict=True))
    result = {
        "images": options.images,
        "detections": options.detections,
        "classes": options.classes,
        "kind": options.kind,
        "rounds": options.rounds,
        "ratio": median["pycocotools"]["seconds"] / median["megdet"]["seconds"],
        "ratio_spread": [min(ratios), max(ratios)],
        "spread": {side: [min(seconds), max(seconds)] for side, seconds in clock.items()},
        "processor_ratio": median["pycocotools"]["processor_seconds"] / median["megdet"]["processor_seconds"],
        "largest_difference": difference,
        "numbers_agree": difference <= 1e-6,
        **median,
    }
    if options.json:
        print(json.dumps(result))
        return
    for side, values in median.items():
        print(
            f"{side:12} {values['seconds']:6.2f} s ({min(clock[side]):.2f} to {max(clock[side]):.2f}), "
            f"of the processor {values['processor_seconds']:6.2f} s, peak memory {values['peak_bytes'] / 1e9:.2f} GB"
        )
    print(f"ratio {result['ratio']:.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    print(f"largest difference of the twelve numbers: {difference:.1e}")


if __name__ == "__main__":
    main()
