"""The cases of `megdet verify`: the recipe itself, and the recipe with one change each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megdet.architecture import Model
from megdet.errors import InputError, nearest
from megdet.model.choice import detector_class
from megdet.recipe import Recipe, RecomputePlan, Watch
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
    has_weights: bool = False
    """whether its images have weights, in a table that `trials` names and `verify` writes"""
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


def _repeats(recipe: Recipe) -> Recipe:
    """Every class that is not in all images comes more often, so that images are repeated within a mini-batch."""
    return replace(recipe, data=replace(recipe.data, repeat_threshold=1.0))


def _copy_paste(recipe: Recipe) -> Recipe:
    """Most images get objects of another one."""
    return replace(recipe, data=replace(recipe.data, copy_paste=0.75))


def _windows(recipe: Recipe) -> Recipe:
    """Parts of most images, some of them cut once more by large-scale jitter."""
    cropped = _crop(recipe)
    return replace(cropped, data=replace(cropped.data, crop_probability=0.75, crop_scales=(0.3, 0.9)))


def _mosaic(recipe: Recipe) -> Recipe:
    """Most pictures of four images, parts of images among them, with objects pasted onto some."""
    return replace(recipe, data=replace(recipe.data, mosaic=0.75, crop_probability=0.3, copy_paste=0.3))


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
    "repeats": Case("images of rare classes several times an epoch", _repeats, (3, 8)),
    "copy-paste": Case("objects of another image pasted onto most images", _copy_paste, (3, 8)),
    "crop-scales": Case("parts of images at several scales, with large-scale jitter", _windows, (3, 8)),
    "mosaic": Case("pictures of four images, with parts of images and copy-paste", _mosaic, (3, 8)),
    "weights": Case("images with weights, one of them left out", devices=(3, 8), has_weights=True),
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
    """CASES, then the cases of the recipe's own kind of detector.

    Another way to compute the same gives other bits, so an exact recipe compares it with itself.
    """
    reference = "" if recipe.exact else "base"
    return CASES | {
        name: Case(what, partial(_with_model, change), (1, 4), reference=reference)
        for name, (what, change) in detector_class(recipe.model).equal_variants.items()
    }


def _with_model(change: Callable[[Any], Model], recipe: Recipe) -> Recipe:
    return replace(recipe, model=change(recipe.model))


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
