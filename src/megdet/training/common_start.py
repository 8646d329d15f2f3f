"""All ranks start from the same place: what they compare before the first step, and the message for a difference."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megdet.distributed.world import World, name_ranks
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.recipe_check import flat_keys
from megdet.run_folder.checkpoint_files import checkpoint_step, latest_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.runtime import kind_of_machine
from megdet.training.datasets import Datasets, fingerprint
from megdet.training.trainer import Trainer, digest

MAY_DIFFER = (
    *("data.train_annotations", "data.train_images", "data.val_annotations", "data.val_images"),
    "data.image_weights",
    *("data.cache", "data.cache_folder", "data.cache_gib"),
)
"""Recipe keys that may differ from host to host: the paths of the data, which are compared by content."""
_LONGEST_VALUE, _MOST_GROUPS, _MOST_HOSTS = 40, 3, 2


def compare_commands(recipe: Recipe, options: Mapping[str, Any], world: World) -> None:
    """Refuse ranks with another recipe or other options of the command line; every rank calls it."""
    keys = {key: value for key, value in flat_keys(asdict(recipe)).items() if key not in MAY_DIFFER}
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    _compare({**keys, **named}, "give every rank the same command", world)
    if recipe.exact:
        mend = "exact needs machines of one kind with one torch; leave the others out, or set exact false"
        _compare({"the kind of machine": kind_of_machine(world.device)}, mend, world)


def compare_data(datasets: Datasets, world: World) -> None:
    """Refuse ranks that have read other images or boxes; every rank calls it."""
    if world.size > 1:
        facts = {"the training data": fingerprint(datasets.train), "the validation data": fingerprint(datasets.val)}
        _compare(
            {f"the fingerprint of {name}": value for name, value in facts.items()},
            "give every host the same images and annotation files",
            world,
        )


def compare_states(trainer: Trainer, step: int, world: World) -> None:
    """Refuse ranks that are at another step, or have a tensor that differs in one bit; every rank calls it."""
    if world.size > 1:
        kinds = trainer.state().items()
        digests = {f"the digest of {kind}": digest(tensors) for kind, tensors in kinds}
        _compare({"the step": step, **digests}, "they must have the same megdet, torch and model code", world)


def newest_step(folder: RunFolder, world: World) -> int | None:
    """The step of rank 0's newest checkpoint, None if it has none; every rank calls it.

    Raises InputError on every rank if one sees a newer checkpoint than rank 0: a run must not go back by itself.
    """
    newest = latest_checkpoint(folder)
    seen: list[int | None] = world.gather_objects(None if newest is None else checkpoint_step(newest))
    if any(step is not None and (seen[0] is None or step > seen[0]) for step in seen):
        mend = "start rank 0 where the newest is, or delete what you do not want"
        own = "none" if newest is None else newest.name
        _compare({f"the newest checkpoint in {folder.path}": own}, mend, world)
    return seen[0]


def _compare(facts: Mapping[str, Any], mend: str, world: World) -> None:
    """Raise InputError on every rank unless all have the same facts; the message names the first that differs."""
    everybody: list[tuple[str, dict[str, Any]]] = world.gather_objects((platform.node(), dict(facts)))
    for fact in facts:
        ranks_of: dict[str, list[int]] = {}
        for rank, (_, own) in enumerate(everybody):
            ranks_of.setdefault(str(own[fact]), []).append(rank)
        if len(ranks_of) > 1:
            groups = [
                f"{_short(value)} on {name_ranks(ranks)} ({_hosts([everybody[rank][0] for rank in ranks])})"
                for value, ranks in ranks_of.items()
            ]
            more = f" and {len(groups) - _MOST_GROUPS} other values" if len(groups) > _MOST_GROUPS else ""
            found = ", ".join(groups[:_MOST_GROUPS])
            raise InputError(f"the ranks do not start from the same place: {fact} is {found}{more}: {mend}")


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."


def _hosts(names: list[str]) -> str:
    hosts = list(dict.fromkeys(names))
    more = f" and {len(hosts) - _MOST_HOSTS} more" if len(hosts) > _MOST_HOSTS else ""
    return f"host{'s' if len(hosts) > 1 else ''} {', '.join(hosts[:_MOST_HOSTS])}{more}"
