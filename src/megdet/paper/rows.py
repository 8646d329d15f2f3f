"""The paper's trainings as recipes at three scales: drawn shapes, blood cells, COCO.

Every row of Tables 2 and 3 keeps its numbers of images: mini-batch and BN size are the paper's at every scale, and so
are the linear scaling rule and the half rate. Not in the paper: which stages frozen rows do not train, and that only
the backbone has batch norm; both are the same at every scale. The changes of a scale are in one packaged recipe,
`reproduce-SCALE`, which is the row of 16 images and BN size 16:

    images and network   its data, backbone, pyramid and heads
    epochs               its length over the 11 epochs of the normal policy; it scales both policies and their decays
    warmup               its steps: 500 times its images in an epoch of the paper over 118,000. So the warmup is the
                         same part of a row's steps as in our recipes of COCO (the paper gives no number)
    rate                 its base_lr instead of 0.02
    clipping             its clip_norm, the same for every row, since so short a run cannot have a warmup that is gentle
                         enough for heads with random weights
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from megdet.errors import InputError
from megdet.paper.tables import FIGURES, TABLE2, TABLE3, TrainingRow, recipe_of
from megdet.recipe import Recipe, Schedule
from megdet.recipe_check import check_recipe
from megdet.recipe_file import load_recipe
from megdet.run_length import decay_of

Scale = Literal["demo", "bccd", "coco"]
SCALES: tuple[Scale, ...] = get_args(Scale)
SweptItem = Literal["table1", "table2", "table3", "figure1", "figure2", "figure4"]
SWEPT_ITEMS: tuple[SweptItem, ...] = get_args(SweptItem)
EntryItem = Literal["table4", "figure5"]
ENTRY_ITEMS: tuple[EntryItem, ...] = get_args(EntryItem)
ClaimItem = Literal[
    "claim-failing",
    "claim-large-batch",
    "claim-bn-size",
    "claim-variance",
    "past-256",
    "critical-batch",
    "real-photos",
]
CLAIM_ITEMS: tuple[ClaimItem, ...] = get_args(ClaimItem)
Item = SweptItem | EntryItem | ClaimItem

PRETRAINING = "reproduce-demo-pretraining"
"""The packaged recipe whose backbone the rows of scale demo start from if no weights are given."""

_FILES = {
    "demo": ("annotations/train.json", "train", "annotations/val.json", "val"),
    "bccd": ("annotations/trainval.json", "images", "annotations/test.json", "images"),
    "coco": ("annotations/instances_train2017.json", "train2017", "annotations/instances_val2017.json", "val2017"),
}
"""Annotations and images for training and for evaluation, in the data folder of a scale."""


def rows_of(item: SweptItem) -> list[TrainingRow]:
    """The trainings that a table or figure needs, in the paper's order.

    Table 1 compares the long trainings of 16 and 256 images that Figure 4 draws, the only ones that reach epoch 12;
    Figure 2 shows the baseline.
    """
    if item in ("table2", "table3"):
        return list(TABLE2 if item == "table2" else TABLE3)
    figure = "figure4" if item == "table1" else item
    if figure == "figure2":
        return [TABLE3[0]]
    wanted = [(c.batch_size, c.bn_size, c.policy) for c in FIGURES if c.figure == figure]
    return [row for row in TABLE3 if (row.batch_size, row.bn_size, row.policy) in wanted]


def row_name(row: TrainingRow) -> str:
    """The name of a row's run folder: `b64-bn0-half`, `b256-bn16-long`."""
    name = recipe_of(row).removeprefix("megdet-r50").removeprefix("-")
    return name or f"b{row.batch_size}-bn{row.bn_size}"


def seed_name(row: TrainingRow, seed: int) -> str:
    """The name of the run folder of a row's seed: `b16-bn0` for the first, then `b16-bn0-s1`."""
    return row_name(row) if seed == 0 else f"{row_name(row)}-s{seed}"


FIXED_KEYS = ("batch_size", "bn_size", "model.backbone.frozen_stages")
"""Keys in which the rows differ."""


def refuse_fixed_keys(scale: Scale, keys: Iterable[str]) -> None:
    """Raise InputError for a key that a row of Tables 2 and 3 sets itself, so that asking for it would do nothing."""
    for key in keys:
        is_schedule = key.startswith("schedule.") and key not in ("schedule.epochs", "schedule.warmup_steps")
        if scale != "coco" and (key in FIXED_KEYS or is_schedule):
            raise InputError(
                f"--{key}: every row has its own, from the paper: choose rows by --rows, or train a recipe"
            )


def row_recipe(row: TrainingRow, scale: Scale, changes: Mapping[str, Any]) -> Recipe:
    """The checked recipe of a row at a scale; `changes` are further keys to change (`data_changes`, weights)."""
    if scale == "coco":
        return load_recipe(recipe_of(row), changes)
    paper, base = load_recipe(recipe_of(row)), load_recipe(f"reproduce-{scale}", changes)
    recipe = replace(
        base,
        batch_size=paper.batch_size,
        bn_size=paper.bn_size,
        model=replace(
            base.model, backbone=replace(base.model.backbone, frozen_stages=paper.model.backbone.frozen_stages)
        ),
        optimizer=replace(
            base.optimizer, base_lr=base.optimizer.base_lr * paper.optimizer.base_lr / Recipe().optimizer.base_lr
        ),
        schedule=scaled_schedule(paper.schedule, base.schedule),
    )
    check_recipe(recipe, f"row {row_name(row)} at scale {scale}")
    return recipe


def scaled_schedule(paper: Schedule, base: Schedule) -> Schedule:
    """A policy of the paper with its length and decays times `epoch_factor(base)`, and the warmup of `base`."""
    factor = epoch_factor(base)
    if factor == 1:
        return replace(paper, warmup_steps=base.warmup_steps)
    decay = decay_of(paper)
    return replace(
        paper,
        policy="step",
        epochs=decay.epochs * factor,
        milestones=tuple(milestone * factor for milestone in decay.milestones),
        factors=decay.factors,
        warmup_steps=base.warmup_steps,
    )


def epoch_factor(base: Schedule) -> float:
    """Epochs of a scale for one epoch of the paper: the length of its base recipe over that of the normal policy."""
    return decay_of(base).epochs / decay_of(Schedule(policy="normal")).epochs


def scale_epoch_factor(scale: Scale) -> float:
    """Epochs of a scale for one epoch of the paper."""
    return 1.0 if scale == "coco" else epoch_factor(load_recipe(f"reproduce-{scale}").schedule)


def data_changes(scale: Scale, folder: Path | None) -> dict[str, Any]:
    """The recipe keys that name the files of a data folder; none for the default folder, data/SCALE.

    Raises InputError for missing files, unless the scale draws them; the message says how to get them.
    """
    root = folder or Path("data") / scale
    keys = ("data.train_annotations", "data.train_images", "data.val_annotations", "data.val_images")
    paths = [root / name for name in _FILES[scale]]
    missing = [path for path in paths if not path.exists()]
    if missing and scale != "demo":
        how = {
            "bccd": f"convert the photos with `megdet data convert --from voc BCCD {root}`",
            "coco": "unpack the images and annotations of COCO 2017 there",
        }[scale]
        raise InputError(f"{missing[0]}: no such file or folder; {how}, or name another folder with --data")
    if folder is None:
        return {}
    return dict(zip(keys, map(str, paths), strict=True))


def weights_changes(scale: Scale, weights: Path | None) -> dict[str, Any]:
    """The recipe key for the backbone's weights. Raises InputError if they are needed and missing."""
    if weights is not None:
        if not weights.is_file():
            raise InputError(f"--weights {weights}: no such file")
        return {"model.backbone.weights": str(weights)}
    if scale == "demo":
        return {}
    network = {"bccd": "MobileNetV2", "coco": "ResNet-50"}[scale]
    raise InputError(
        f"scale {scale} starts from ImageNet weights, as the paper does: name a file of {network} with --weights FILE "
        "(torchvision's or timm's); rows of BN size 0 keep its statistics"
    )


def chosen_rows(rows: list[TrainingRow], names: str | None) -> list[TrainingRow]:
    """The rows with these names, separated by commas; None = all. Raises InputError for an unknown name."""
    if names is None:
        return rows
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [row_name(row) for row in rows]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise InputError(f"--rows {names}: no row '{', '.join(unknown)}'; there are {', '.join(known)}")
    return [row for row in rows if row_name(row) in wanted]
