"""The learning rate of every step: a pure function of (recipe, steps an epoch, step) (Sec. 3.2 and 4)."""

import math

from megdet.recipe import Recipe
from megdet.run_length import decay_of, total_steps

BASE_BATCH_SIZE = 16


def scaled_rate(recipe: Recipe) -> float:
    """The rate after warmup: base_lr * batch_size / 16 (linear scaling rule), or base_lr * sqrt(batch_size / 16).

    The root is used with Adam-like optimizers, whose step does not grow with the gradient (You et al. 2020); it keeps
    the variance of an update (Krizhevsky 2014).
    """
    if recipe.optimizer.scaling == "sqrt":
        return recipe.optimizer.base_lr * math.sqrt(recipe.batch_size / BASE_BATCH_SIZE)
    return recipe.optimizer.base_lr * recipe.batch_size / BASE_BATCH_SIZE


def learning_rate(recipe: Recipe, num_images: int, step: int) -> float:
    """The rate of step 0, 1, ...: warmup step by step, times the decays whose epochs have passed.

    Warmup runs from warmup_start * base_lr to the scaled rate, linearly or by the same factor every step. It never goes
    down: a mini-batch whose scaled rate is lower starts at that rate. With policy cosine the rate falls to 0 along half
    a cosine over the whole run.
    """
    schedule, rate = recipe.schedule, scaled_rate(recipe)
    epoch = step * recipe.batch_size / num_images
    decay = decay_of(schedule)
    if schedule.policy == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps(recipe, num_images))))
    else:
        passed = [f for milestone, f in zip(decay.milestones, decay.factors, strict=True) if epoch >= milestone - 1e-9]
        factor = math.prod(passed)
    if step < schedule.warmup_steps:
        start = min(rate, schedule.warmup_start * recipe.optimizer.base_lr)
        part = step / schedule.warmup_steps
        if schedule.warmup == "exponential" and start:
            rate = start * (rate / start) ** part
        else:
            rate = start + (rate - start) * part
    return rate * factor


def rewarm_factor(recipe: Recipe, step: int, roll_backs: int, rolled_back_to: int) -> float:
    """The factor on the rate of step 0, 1, ... after a roll-back to a checkpoint; 1 without one.

    It rises linearly to 1 in `watch.rewarm_steps` steps from that checkpoint on, in twice as many after each further
    roll-back: with the same factors the same steps would diverge again.
    """
    if not roll_backs:
        return 1.0
    return min(1.0, (step - rolled_back_to + 1) / (recipe.watch.rewarm_steps << (roll_backs - 1)))


def why_no_warmup(recipe: Recipe) -> str:
    """Why the recipe's warmup has no effect, and how to change that; empty if it has one or there is no warmup.

    With the defaults the rate rises for more than 16 images only: it starts at base_lr, the rate for 16.
    """
    schedule, base_lr, rate = recipe.schedule, recipe.optimizer.base_lr, scaled_rate(recipe)
    if not schedule.warmup_steps or not base_lr or schedule.warmup_start * base_lr < rate:
        return ""
    return (
        f"schedule.warmup_steps {schedule.warmup_steps} does nothing: {recipe.batch_size} images have a rate of "
        f"{rate:g}, and schedule.warmup_start {schedule.warmup_start:g} x base_lr {base_lr:g} is not below it; set "
        f"schedule.warmup_start below {rate / base_lr:g} for a warmup"
    )
