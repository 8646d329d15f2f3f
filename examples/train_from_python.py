"""Train, evaluate and detect from Python: what the verbs of the command line do, as function calls.

    python examples/train_from_python.py

Draws a small data set, trains a small detector for two epochs of it, and prints what it finds on one image.
"""

from pathlib import Path

import megdet
from megdet.data.demo import draw_demo


def main() -> None:
    data = Path("data/example_shapes")
    draw_demo(data, num_train=64, num_val=8)
    own_data = {
        "train_annotations": str(data / "annotations/train.json"),
        "train_images": str(data / "train"),
        "val_annotations": str(data / "annotations/val.json"),
        "val_images": str(data / "val"),
        "draw_demo": "",
    }
    changes = {"data": own_data, "schedule.epochs": 2, "schedule.warmup_steps": 4}
    run = megdet.train("demo", {**changes, "model.box_head.score_threshold": 0.01}, run="runs/from_python", workers=1)
    print(f"mmAP {100 * run.evaluation.bbox.AP:.1f} after 2 epochs of 64 images: far too few to learn much")

    detector = run.load()
    found = detector(data / "val" / "000000.jpg")
    print(found)
    for name, score, box in zip(found.names[:3], found.scores[:3], found.boxes[:3].round(1).tolist(), strict=True):
        print(f"{name} {score:.2f} at {box}")
    found.draw(score=0.2).save("runs/from_python/pictures/found.png")


if __name__ == "__main__":
    main()
