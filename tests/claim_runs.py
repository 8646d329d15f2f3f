"""Claims whose trainings only write their numbers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megdet.data.demo import draw_demo
from megdet.distributed.world import World
from megdet.evaluation.coco_numbers import Evaluation
from megdet.paper.claims.run import ClaimOrder, reproduce_claim
from megdet.paper.report import Report
from megdet.paper.rows import ClaimItem
from megdet.paper.sweep import Train
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter
from megdet.training.run import RunOptions
from small_runs import ALONE

KEYS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()


def training(score_of: Callable[[Recipe, RunFolder], float]) -> Train:
    """A training of 20 steps whose mmAP (0 to 1) is what `score_of` says; it may raise DivergedError instead."""

    def train(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> Evaluation:
        folder.create().write_recipe(dump_recipe(recipe))
        with MetricsWriter(folder.metrics) as metrics:
            for step in range(1, 21):
                loss = 3.0 / step
                metrics.write({"step": step, "epoch": step / 20, "loss": loss, "seconds": 1.0, "gradient_norm": 2.0})
            score = score_of(recipe, folder)
            metrics.write({"step": 20, "evaluation": {"bbox": {"AP": score}}, "seconds": 1.0})
        return Evaluation.from_dict({"bbox": {**dict.fromkeys(KEYS, score), "per_class": {}}})

    return train


def claim_order(folder: Path, item: ClaimItem) -> ClaimOrder:
    """An order on four drawn images, with a file of weights that nobody reads."""
    data, weights = folder / "data", folder / "mobilenet.pth"
    draw_demo(data, num_train=4, num_val=2, size=64, workers=1)
    weights.touch()
    return ClaimOrder(item, folder / "runs", data, weights, overrides={"data.draw_demo": ""})


def run_claim(order: ClaimOrder, train: Train, **changes: Any) -> tuple[Report, list[str]]:
    """The report, and what was said."""
    heard: list[str] = []
    report = reproduce_claim(replace(order, **changes), RunOptions(), ALONE, say=heard.append, train_row=train)
    assert report is not None
    return report, heard
