"""The cases of `megdet verify`: the recipe itself, and the recipe with one change each."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megdet.architecture import Model
from megdet.contract.run import Training
from megdet.errors import InputError, nearest
from megdet.model.choice import detector_class
from megdet.recipe import Recipe, RecomputePlan, Watch
from megdet.recipe_check import check_recipe
from megdet.recipe_file import load_recipe


def _same(recipe: Recipe) -> Recipe:
    return recipe


@dataclass(frozen=True)
class Case:
    """One change of the recipe, and the device counts on which it is tried."""

    what: str
    change: Callable[[Recipe], Recipe] = _same
    devices: tuple[int, ...] = ()
    """numbers of devices to try besides the first, if asked for, else the last one asked for; empty = all"""
    lane_width: int = 0
    """forced lane width; numbers of devices that are not a multiple of it are left out"""
    reference: str = ""
    """the case whose result it must equal; empty = its own on the first number of devices"""
    stops: str = ""
    """moved = stopped half-way and resumed on another number of devices; same = on the same number, bitwise"""


def _bn(size: int) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, bn_size=size)


def _recompute(plan: RecomputePlan) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, recompute=plan)


def _frozen(recipe: Recipe) -> Recipe:
    norms = {section: norm for section, norm in recipe.model.norms.items() if section != "backbone" and norm == "batch"}
    return replace(recipe, bn_size=0, model=recipe.model.with_norms(dict.fromkeys(norms, "none")))


def _group_norm(recipe: Recipe) -> Recipe:
    frozen = _frozen(recipe)
    return replace(frozen, model=frozen.model.with_norms({"backbone": "group"}))


def _head_norms(recipe: Recipe) -> Recipe:
    others = [section for section in recipe.model.norms if section != "backbone"]
    return replace(recipe, model=recipe.model.with_norms(dict.fromkeys(others, "batch")))


def _detector_of(name: str) -> Callable[[Recipe], Recipe]:
    """Take the detector of a packaged recipe, a small one of another kind."""
    return lambda recipe: replace(recipe, model=load_recipe(name).model)


def _multi_scale(recipe: Recipe) -> Recipe:
    edge = recipe.data.short_edges[-1]
    data = replace(recipe.data, short_edges=(edge * 3 // 4, edge, edge * 3 // 2), scale_jitter=(0.8, 1.25))
    looks = replace(recipe.evaluation, scales=(edge * 3 // 4, edge), flip=True)
    data = replace(data, max_long_edge=recipe.data.max_long_edge * 2, color_jitter=0.4)
    return replace(_repeated_looks(recipe), data=data, evaluation=looks)


def _repeated_looks(recipe: Recipe) -> Recipe:
    """Iterative box regression and box voting, if the detector has a second stage."""
    looks = {
        name: replace(section, test_iterations=1, vote_iou=0.5)
        for name, section in vars(recipe.model).items()
        if hasattr(section, "test_iterations")
    }
    return replace(recipe, model=replace(recipe.model, **looks))


def _crop(recipe: Recipe) -> Recipe:
    edge = recipe.data.short_edges[-1]
    data = replace(recipe.data, crop=(edge, edge), scale_jitter=(0.3, 2.0), scale_law="factor", crop_least_area=0.1)
    return replace(recipe, data=data)


def _averages(recipe: Recipe) -> Recipe:
    return replace(recipe, optimizer=replace(recipe.optimizer, ema_decay=0.9))


def _optimizer(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, optimizer=replace(recipe.optimizer, **changes))


def _agvm(**changes: Any) -> Callable[[Recipe], Recipe]:
    """AGVM, with a warmup of one step so that a few steps measure, and with two groups if their number is odd."""

    def change(recipe: Recipe) -> Recipe:
        recipe = replace(_optimizer(agvm=True, **changes)(recipe), schedule=replace(recipe.schedule, warmup_steps=1))
        if recipe.groups_per_step % 2 == 0 or recipe.batch_size % 2:
            return recipe
        half = recipe.batch_size // 2
        return replace(recipe, bn_size=half) if recipe.bn_size else replace(recipe, group_size=half)

    return change


def _noise(recipe: Recipe) -> Recipe:
    return replace(recipe, noise_interval=2)


def _noise_of_steps(recipe: Recipe) -> Recipe:
    return replace(recipe, noise_interval=3, bn_size=recipe.batch_size)


def _watch(recipe: Recipe) -> Recipe:
    """A watch that leaves out two healthy updates of twenty: one before and one after a stop half-way."""
    return replace(_averages(recipe), watch=Watch(window=3, explodes_at=2.0))


CASES = {
    "base": Case("the recipe as it is written"),
    "bn-2": Case("BN size 2", _bn(2), (3, 8)),
    "bn-8": Case("BN size 8", _bn(8), (3, 8)),
    "bn-all": Case("BN size = mini-batch", lambda recipe: replace(recipe, bn_size=recipe.batch_size), (3, 8)),
    "lane-1": Case("every rank carries groups of its own", lane_width=1, reference="base"),
    "lane-2": Case("two ranks carry a group together", lane_width=2, reference="base"),
    "lane-4": Case("four ranks carry a group together", lane_width=4, reference="base"),
    "recompute-block": Case("each block computed again in the backward", _recompute("block"), (1, 3), reference="base"),
    "recompute-stage": Case(
        "each stage computed again, two ranks to a group", _recompute("stage"), lane_width=2, reference="base"
    ),
    "recompute-sqrt": Case("runs of blocks computed again", _recompute("sqrt"), (1, 2), reference="base"),
    "frozen": Case("frozen statistics (BN size 0)", _frozen, (3, 8)),
    "group-norm": Case("group norm in the backbone", _group_norm, (4,)),
    "head-norms": Case("batch norm behind the backbone too", _head_norms, (3, 8)),
    "multi-scale": Case("scale and colour jitter; detection at two scales, mirrored, with votes", _multi_scale, (2, 8)),
    "crop": Case("large-scale jitter: crops at a place drawn for each image", _crop, (3, 8)),
    "retinanet": Case("RetinaNet, the small one of recipe verify-retinanet", _detector_of("verify-retinanet"), (3, 8)),
    "rfcn": Case("R-FCN, deformable, hard RoIs, recipe verify-rfcn", _detector_of("verify-rfcn"), (3, 8)),
    "heads": Case(
        "hard RoIs, inception, maxout, regions and context, recipe verify-heads", _detector_of("verify-heads"), (3, 8)
    ),
    "features": Case(
        "groups, squeeze-and-excitation, atrous, large kernels, segmentation, recipe verify-features",
        _detector_of("verify-features"),
        (3, 8),
    ),
    "light-head": Case("R-FCN with a light head, recipe verify-light-head", _detector_of("verify-light-head"), (3,)),
    "averages": Case("averaged weights (EMA)", _averages, (4,)),
    "agvm": Case("AGVM, a rate for each module", _agvm(), (3, 8)),
    "agvm-adamw": Case(
        "AGVM with AdamW",
        _agvm(kind="adamw", base_lr=1e-4, weight_decay=0.05, scaling="sqrt"),
        (4,),
    ),
    "lars": Case("LARS", _optimizer(kind="lars", base_lr=1.0), (3,)),
    "lamb": Case("LAMB", _optimizer(kind="lamb", base_lr=1e-3, weight_decay=0.01, scaling="sqrt"), (3,)),
    "noise": Case("gradient noise scale of the halves", _noise, (3,)),
    "noise-steps": Case("gradient noise scale of successive steps", _noise_of_steps, (3,)),
    "watch": Case("some updates left out because their gradient is large", _watch, (2, 3)),
    "resume-watch": Case(
        "updates left out, stopped half-way, gone on with on another count", _watch, reference="watch", stops="moved"
    ),
    "mask-rcnn": Case("Mask R-CNN, the small one of recipe verify-mask", _detector_of("verify-mask"), (3, 8)),
    "cascade": Case("Cascade R-CNN with masks, recipe verify-cascade", _detector_of("verify-cascade"), (3, 8)),
    "resume-agvm": Case(
        "AGVM, stopped half-way, gone on with on another count",
        _agvm(),
        reference="agvm",
        stops="moved",
    ),
    "resume": Case("stopped half-way, gone on with on another count", _averages, reference="averages", stops="moved"),
    "new-process": Case("stopped half-way, gone on with in new processes: bitwise", devices=(4,), stops="same"),
}
"""Name -> case, in the order of the trials; for every kind of detector."""

SHORT = ("base", "bn-all", "agvm", "resume", "new-process")
"""Cases that take about a minute together."""


def cases_of(recipe: Recipe) -> dict[str, Case]:
    """CASES, then the cases of the recipe's own kind of detector."""
    return CASES | {
        name: Case(what, partial(_with_model, change), (1, 4), reference="base")
        for name, (what, change) in detector_class(recipe.model).equal_variants.items()
    }


def _with_model(change: Callable[[Any], Model], recipe: Recipe) -> Recipe:
    return replace(recipe, model=change(recipe.model))


@dataclass(frozen=True)
class Trial:
    """A run, or the halves of a stopped one, and the run that it must equal."""

    case: str
    runs: tuple[Training, ...]
    reference: tuple[Training, ...]
    is_bitwise: bool = False

    @property
    def has_other_layout(self) -> bool:
        """Whether the run is compared with a run of another layout."""
        return any(run.layout != own.layout for run in self.runs for own in self.reference)


@dataclass(frozen=True)
class LeftOut:
    """Device counts on which a case is not tried, although they were asked for."""

    case: str
    devices: tuple[int, ...]
    why: str


def chosen_cases(words: str, recipe: Recipe) -> tuple[str, ...]:
    """The names of cases for `all`, `short` or NAME,NAME. Raises InputError for an unknown name."""
    cases = cases_of(recipe)
    if words in ("all", "short"):
        return tuple(cases) if words == "all" else SHORT
    names = tuple(word.strip() for word in words.split(","))
    for name in names:
        if name not in cases:
            raise InputError(f"no case '{name}'{nearest(name, cases)}; there are all, short, {', '.join(cases)}")
    return names


def trials(
    recipe: Recipe, names: Sequence[str], devices: Sequence[int], steps: int, lane_width: int | None, folder: Path
) -> list[Trial]:
    """All trials, each once; the reference of a case comes first.

    `lane_width` is forced on every number of devices, except on the first (the reference) if it does not divide that.
    Checkpoints go into `folder`. Raises InputError for an impossible recipe or layout, and if nothing would be
    compared.
    """
    first, cases = devices[0], cases_of(recipe)
    forced = first if lane_width and first % lane_width else 0

    def run(name: str, count: int, width: int | None = None, **halves: Any) -> Training:
        changed = cases[name].change(recipe)
        check_recipe(changed, f"case {name}")
        width = width or (None if count == forced else lane_width)
        made = Training(changed, count, width, (0, steps))
        # with the chosen width, two names of one layout are one run
        return replace(made, lane_width=made.layout.lane_width, **halves)

    def of(name: str) -> Iterator[Trial]:
        case = cases[name]
        truth = (run(case.reference or name, first),)
        half = steps // 2
        if case.stops and not 0 < half < steps:
            raise InputError(f"case {name} stops half-way: ask for at least 2 steps, not {steps}")
        if case.stops == "same":
            count = max((n for n in devices if n <= max(case.devices)), default=first)
            whole = run(name, count)
            yield Trial(name, (whole,), (whole,))
            yield Trial(name, _stopped(whole, whole, half, folder / f"{name}-{count}"), (whole,), is_bitwise=True)
        elif case.stops == "moved":
            for before, after in _moves(devices):
                runs = _stopped(run(name, before), run(name, after), half, folder / f"{name}-{before}-{after}")
                yield Trial(name, runs, truth)
        elif case.lane_width:
            for count in devices:
                if count % case.lane_width == 0:
                    yield Trial(name, (run(name, count, case.lane_width),), truth)
        else:
            asked = devices if case.reference else devices[1:]
            wanted = [n for n in asked if not case.devices or n in case.devices] or list(asked[-1:])
            if not case.reference:
                yield Trial(name, truth, truth)
            for count in wanted:
                yield Trial(name, (run(name, count),), truth)

    found: dict[tuple[tuple[Training, ...], tuple[Training, ...]], Trial] = {}
    for trial in itertools.chain.from_iterable(map(of, names)):
        found.setdefault((trial.runs, trial.reference), trial)  # lane-1 may be the same runs as base
    if all(trial.runs == trial.reference for trial in found.values()):
        raise InputError(
            f"nothing to compare: {', '.join(names)} on {', '.join(map(str, devices))} device(s); "
            "name at least two device counts, as in --devices 1,2"
        )
    return list(found.values())


def left_out(recipe: Recipe, planned: Sequence[Trial], names: Sequence[str], devices: Sequence[int]) -> list[LeftOut]:
    """The cases that are not tried on every number of devices asked for, and why."""
    found = []
    for name, case in cases_of(recipe).items():
        tried = {run.ranks for trial in planned if trial.case == name for run in trial.runs}
        missing = [count for count in devices if count not in tried]
        uneven = [count for count in missing if case.lane_width and count % case.lane_width]
        even = [count for count in missing if count not in uneven]
        if name not in names:
            reasons = [(missing, "not asked for")]
        elif case.lane_width:
            reasons = [
                (uneven, f"{case.lane_width} does not divide them"),
                (even, f"the same as case {case.reference} there"),
            ]
        else:
            reasons = [(missing, "to save time")]
        found += [LeftOut(name, tuple(counts), why) for counts, why in reasons if counts]
    return found


def _moves(devices: Sequence[int]) -> list[tuple[int, int]]:
    """From the most devices to the first, and from the first to the middle one."""
    moves = [(devices[-1], devices[0]), (devices[0], devices[len(devices) // 2])]
    return [(before, after) for before, after in moves if before != after]


def _stopped(before: Training, after: Training, half: int, folder: Path) -> tuple[Training, Training]:
    steps = before.steps[1]
    return replace(before, steps=(0, half), folder=folder), replace(after, steps=(half, steps), folder=folder)
