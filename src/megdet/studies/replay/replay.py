"""`megdet replay`: a step is a function of (recipe, checkpoint, step), so any step can be made again and examined."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError, shown
from megdet.inference.trained import read_recipe
from megdet.recipe import Recipe
from megdet.recipe_file import first_difference
from megdet.run_folder.checkpoint_files import checkpoint_step, checkpoints
from megdet.run_folder.folder import RunFolder, encode_non_finite
from megdet.run_folder.metrics import read_metrics
from megdet.runtime import device_kind, num_gpus
from megdet.studies.replay.look import ImageLosses, Look, NotFinite, looking
from megdet.studies.replay.pictures import draw_images
from megdet.studies.replay.record import Comparison, compare
from megdet.training.optimizers.parts import parts_of
from megdet.training.run import Run, RunOptions, open_run
from megdet.training.step import read_results

_HANGS_AFTER = 3600.0
_PICTURES = 8
"""Number of images drawn unless one is asked for: those with the largest losses."""


@dataclass(frozen=True)
class Request:
    """The step to make again, and what to show of it."""

    folder: Path
    step: int
    """number of the step as in metrics.jsonl: 1, 2, ..."""
    out: Path
    """folder of the pictures"""
    image: str = ""
    """id of the only image to show; empty = all"""
    without: str = ""
    """id of an image that is left out of its group in this step; empty = none"""
    roll_backs: int | None = None
    """make the step as the run made it after so many roll-backs; None = as it made it last"""
    overrides: Mapping[str, Any] | None = None
    """recipe keys that do not change the result, such as the path of the images"""


@dataclass(frozen=True)
class Replay:
    """The result of a replay."""

    step: int
    started_from: int
    """the step of the checkpoint, 0 for the start of the run"""
    devices: int
    rate: float
    numbers: Mapping[str, Any]
    """the line of the step as in metrics.jsonl"""
    images: Sequence[ImageLosses]
    """losses of the images of the step, in the order of the plan"""
    norms: Mapping[str, float]
    """norm of the gradient before clipping, by part of the detector"""
    not_finite: NotFinite | None
    """the first layer whose output is not finite"""
    wrong_gradients: Sequence[str]
    """parameters whose gradient is not finite, in the order of the backward"""
    comparison: Comparison
    pictures: Sequence[Path]
    without: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For strict JSON."""
        wrong = self.comparison.first_wrong
        found = asdict(self) | {
            "images": [asdict(own) | {"loss": own.loss} for own in self.images],
            "pictures": [str(path) for path in self.pictures],
            "agrees": wrong is None,
            "verdict": self.comparison.sentence(),
        }
        return dict(encode_non_finite(found))


def replay(
    request: Request,
    world: World | None,
    devices: int = 1,
    options: RunOptions | None = None,
    device: str | None = None,
) -> Replay:
    """Make a step of a run again and examine it; the run is not changed.

    Args:
        request: the step and what to show of it.
        world: this process, if `devices` is 1.
        devices: number of ranks; several ranks are processes of their own.
        options: options of this machine.
        device: of several ranks, cpu or cuda; by default GPUs where there are enough.

    Raises:
        InputError: there is no such run, step, image or device, its data are missing, or the layout is impossible.
    """
    if "WORLD_SIZE" in os.environ:
        raise InputError("replay starts its processes itself: run it without torchrun")
    options = options or RunOptions(workers=0)
    if world is not None and devices == 1:
        found = _replay_rank(world, request, options)
    else:
        if device == "cuda" and num_gpus() < devices:
            raise InputError(f"--device cuda --devices {devices}: this machine has {num_gpus()} GPU(s)")
        kind = device or ("cuda" if num_gpus() >= devices else "cpu")
        if kind != "cuda":
            device_kind(kind)  # a wrong word is refused before the ranks start
        found = run_in_ranks(_replay_rank, devices, request, options, timeout=_HANGS_AFTER, device=kind)[0]
    assert found is not None
    return found


def _replay_rank(world: World, request: Request, options: RunOptions) -> Replay | None:
    """The work of one rank; rank 0 gets the result."""
    folder = RunFolder(request.folder)
    recipe, lines = world.on_first(lambda: (_recipe_of(folder, request), read_metrics(folder.metrics)))
    backs = [line["step"] for line in lines if "rolled_back" in line and line["step"] < request.step]
    count = len(backs) if request.roll_backs is None else request.roll_backs
    start = world.on_first(lambda: _start_of(folder, request, backs, count))
    with open_run(recipe, world, options, start=start, is_new=False) as run:
        if request.step > run.last_step:
            raise InputError(f"--step {request.step}: the run has {run.last_step} steps")
        run.position = replace(run.position, roll_backs=count, rolled_back_to=backs[count - 1] if count else -1)
        last, without = request.step - 1, _image(run, request, "without")
        shown_image = _image(run, request, "image")
        made = [(result.rate, read_results([result], run.trainer)[0]) for result in run.steps(run.first_step, last)]
        with looking(run, without) as look:
            [result] = list(run.steps(last, last + 1))
        made.append((result.rate, read_results([result], run.trainer)[0]))
        looks: list[Look] = world.gather_objects(replace(look, forwards=[]))
        images = sorted((own for each in looks for own in each.images), key=lambda own: own.place)
        not_finite = min((own for each in looks for own in each.not_finite), key=lambda own: own.group, default=None)
        chosen = _chosen(images, None if shown_image is None else run.datasets.train.image_ids[shown_image])
        pictures = world.gather_objects(draw_images(look.forwards, run.datasets.train, chosen, request.out))
        here = [{"step": run.first_step + place, **numbers} for place, (_, numbers) in enumerate(made, 1)]
        compared = here[:-1] if request.without else here
        return Replay(
            request.step,
            run.first_step,
            world.size,
            result.rate,
            here[-1],
            images if shown_image is None else [own for own in images if own.image_id in chosen],
            _norms(run, here[-1]["gradient_norm"], is_left_out="left_out" in here[-1]),
            not_finite,
            _wrong_gradients(run),
            compare(compared, lines if count == len(backs) else [], recipe.precision),
            sorted({path for own in pictures for path in own}),
            request.without,
        )


def _recipe_of(folder: RunFolder, request: Request) -> Recipe:
    own, changed = read_recipe(folder), read_recipe(folder, dict(request.overrides or {}))
    if difference := first_difference(changed, own):
        raise InputError(f"replay makes the run's own step, and this changes it: {difference}: leave the option out")
    return changed


def _start_of(folder: RunFolder, request: Request, backs: Sequence[int], count: int) -> Path | None:
    """The newest checkpoint before the step, None to begin where the run began."""
    if request.step < 1:
        raise InputError(f"--step {request.step}: steps count from 1, as in {folder.metrics}")
    if count > len(backs):
        raise InputError(f"--roll-backs {count}: before step {request.step} the run went back {len(backs)} times")
    before = [path for path in checkpoints(folder) if checkpoint_step(path) < request.step]
    started = checkpoint_step(before[-1]) if before else 0
    if count and started < backs[count - 1]:
        raise InputError(
            f"step {request.step} came after a roll-back to step {backs[count - 1]}, whose checkpoint is gone: replay "
            "a step after one of the checkpoints that are left"
        )
    return before[-1] if before else None


def _image(run: Run, request: Request, option: str) -> int | None:
    """The index in the data set of the image that an option names. Raises InputError unless it is in the step."""
    text, ids = getattr(request, option), run.datasets.train.image_ids
    if not text:
        return None
    members = [image.index for group in run.plan.groups(request.step - 1) for image in group.images]
    for index in members:
        if str(ids[index]) == text:
            return index
    some = ", ".join(str(ids[index]) for index in members[:_PICTURES])
    more = ", ..." if len(members) > _PICTURES else ""
    raise InputError(f"--{option} {shown(text)}: no such image in step {request.step}, which has {some}{more}")


def _chosen(images: Sequence[ImageLosses], image_id: int | str | None) -> set[int | str]:
    """The ids of the images to draw: the one asked for, or those with the largest losses, NaN first."""
    if image_id is not None:
        return {image_id}
    ordered = sorted(images, key=lambda own: own.loss if own.loss < float("inf") else float("inf"), reverse=True)
    return {own.image_id for own in ordered[:_PICTURES]}


def _norms(run: Run, norm: float, *, is_left_out: bool) -> dict[str, float]:
    """The norm of the gradient by part, before it was clipped."""
    buckets, clip = run.trainer.buckets, run.recipe.optimizer.clip_norm
    factor = min(1.0, clip / (norm + 1e-6)) if clip and not is_left_out else 1.0
    parts, names = parts_of(run.trainer.model, buckets.parameters), run.trainer.model.parts
    gradients = buckets.gradients
    return {
        names.get(part, part): float(torch.nn.utils.get_total_norm([gradients[place] for place in places])) / factor
        for part, places in parts.items()
    }


def _wrong_gradients(run: Run) -> list[str]:
    names = {parameter: name for name, parameter in run.trainer.model.named_parameters()}
    buckets = run.trainer.buckets
    pairs = zip(buckets.parameters, buckets.gradients, strict=True)
    return [names[parameter] for parameter, gradient in pairs if not gradient.isfinite().all()]
