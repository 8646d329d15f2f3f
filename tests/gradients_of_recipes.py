"""Prints a SHA-256 of the gradients of each recipe's detector on one batch: PRECISION RECIPE[:KEY=NUMBER]..."""

import hashlib
import sys

import torch

from factories import masked_batch, tiny_batch
from megdet.inference.trained import place_model
from megdet.model.choice import make_detector
from megdet.precision import arithmetic, backward
from megdet.recipe_file import load_recipe

CPU = torch.device("cpu")


def main() -> None:
    precision, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for name in names:
        recipe_name, _, change = name.partition(":")
        key, _, number = change.partition("=")
        recipe = load_recipe(recipe_name, {key: int(number)} if change else {})
        torch.manual_seed(0)
        model = make_detector(recipe, 3)
        place_model(model, CPU, precision)
        model.train()
        batch = masked_batch() if "mask_head" in model.loss_names else tiny_batch(canvas=320)
        with arithmetic(precision, CPU):
            losses = model(batch)
        backward(torch.stack([losses[part].sum() for part in model.loss_names]).sum(), precision)
        digest = hashlib.sha256()
        for parameter in model.parameters():
            if parameter.grad is not None:
                digest.update(parameter.grad.numpy().tobytes())
        print(name, digest.hexdigest())


if __name__ == "__main__":
    main()
