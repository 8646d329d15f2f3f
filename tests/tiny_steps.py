"""Single steps of a tiny detector on batches that a test makes."""

from dataclasses import replace

import torch

from factories import TINY, tiny_detector, with_model
from megdet.inference.trained import place_model
from megdet.recipe import Recipe
from megdet.structures import Batch
from megdet.training.step import StepResult, train_step
from megdet.training.trainer import Trainer, trainer_of
from small_runs import ALONE

SMALL = with_model(TINY, backbone={"name": "test_resnet"})
FROZEN = replace(SMALL, batch_size=8, bn_size=0, precision="float64")
BATCH = replace(SMALL, batch_size=8, bn_size=4, precision="float64")


def make_trainer(recipe: Recipe) -> Trainer:
    model = tiny_detector(recipe)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if not parameter.any():  # fresh blocks end in a norm of weight 0, which hides the gradient before it
                parameter.fill_(0.5)
    place_model(model, ALONE.device, recipe.precision)
    model.train()
    return trainer_of(recipe, model, ALONE)


def split(batch: Batch, size: int) -> list[Batch]:
    return [batch[start : start + size] for start in range(0, len(batch.pixels), size)]


def result_of(trainer: Trainer, batches: list[Batch], rate: float = 0.01, number: int = 0) -> StepResult:
    return train_step(trainer, iter(batches), range(len(batches)), rate, number, ALONE)
