"""Train, evaluate and detect from Python: what the verbs of the command line do, as function calls.

    python examples/train_from_python.py

Draws a small data set, trains a small detector for two epochs of it, and prints what it finds on one image.
"""

from pathlib import Path

from megdet.data.demo import draw_demo
from megdet.distributed.world import start_world
from megdet.inference.predict import detect_image
from megdet.inference.trained import load_detector
from megdet.recipe_file import load_recipe
from megdet.run_folder.folder import RunFolder
from megdet.training.loop import train
from megdet.training.run import RunOptions


def main() -> None:
    data = Path("data/example_shapes")
    draw_demo(data, num_train=64, num_val=8)
    recipe = load_recipe(
        "demo",
        {
            "data.train_annotations": str(data / "annotations/train.json"),
            "data.train_images": str(data / "train"),
            "data.val_annotations": str(data / "annotations/val.json"),
            "data.val_images": str(data / "val"),
            "data.draw_demo": "",
            "schedule.epochs": 2,
            "schedule.warmup_steps": 4,
            "model.box_head.score_threshold": 0.01,
        },
    )
    world = start_world()  # one process, or this rank of those that torchrun started
    folder = RunFolder(Path("runs/example"))
    numbers = train(recipe, folder, RunOptions(workers=1), world)
    score = 100 * numbers.bbox.AP
    print(f"mmAP {score:.1f} after {recipe.schedule.epochs:g} epochs of 64 images: far too few to learn much")

    trained = load_detector(folder, world.device)
    _, detections = detect_image(trained, data / "val" / "000000.jpg")
    for detection in detections[:3]:
        print(detection)


if __name__ == "__main__":
    main()
