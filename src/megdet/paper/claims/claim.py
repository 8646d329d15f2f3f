"""The claims: for each its question, what the paper says, its rows and seeds, and the statements that are judged.

Everything here is fixed before a row is trained. All rows of a claim have one recipe but for the keys in their names:
nothing is clipped, all stages are trained, with batch norm or without, and an update is left out, which ends the
training, only where a number is not finite.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megdet.paper.claims.rules import FailMore, Keeps, Scores
from megdet.paper.rows import ClaimItem, Scale


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the experiment that tests it."""

    name: ClaimItem
    question: str
    paper: str
    """what the paper says of it, and where; or `Not in the paper:`"""
    scale: Scale
    recipe: str
    """the packaged recipe of its rows"""
    keys: Mapping[str, Any]
    """keys of all rows, on top of the recipe"""
    rows: Mapping[str, Mapping[str, Any]]
    """by name, the keys of a row on top of those"""
    seeds: int
    """trainings of each row"""
    statements: tuple[FailMore, ...] | tuple[Scores, ...] | tuple[Keeps, ...]
    pictures: tuple[int, int] | None = None
    """drawn for it to train on and to evaluate on; None = the data of its scale as they are"""
    trunk: Mapping[str, Any] = field(default_factory=dict)
    """keys, on top of `keys`, of one training from whose weights all rows start; none = there is no such training"""
    factors: tuple[int, ...] = ()
    """k of Eq. 4, measured at the kept checkpoints of every training; none = nothing is measured"""


_ALIKE = {
    "optimizer.clip_norm": 0,
    "optimizer.base_lr": 0.0025,
    "model.backbone.frozen_stages": 0,
    "watch.explodes_at": 0,
}
_BATCHES, _RATES, _WARMUP, _AFTER, _IMAGES = (16, 64, 128, 256), (0.0025, 0.01), 34, 20, 2000


def _failing() -> Claim:
    rows, statements = {}, []
    for rate in _RATES:
        for batch in _BATCHES:
            for bn_size in (0, 16):
                for warmup in (0, _WARMUP):
                    rows[_failing_row(batch, bn_size, warmup, rate)] = {
                        "batch_size": batch,
                        "bn_size": bn_size,
                        "optimizer.base_lr": rate,
                        "schedule.warmup_steps": warmup,
                        "schedule.epochs": (warmup + _AFTER) * batch / _IMAGES,
                    }
        for batch in _BATCHES[1:]:
            statements.append(
                FailMore(
                    f"{batch} images fail without batch norm, at a base rate of {rate:g} with a warmup",
                    _failing_row(batch, 0, _WARMUP, rate),
                    _failing_row(batch, 16, _WARMUP, rate),
                )
            )
            statements.append(
                FailMore(
                    f"{batch} images fail without a warmup, at a base rate of {rate:g} with batch norm",
                    _failing_row(batch, 16, 0, rate),
                    _failing_row(batch, 16, _WARMUP, rate),
                )
            )
    return Claim(
        "claim-failing",
        "Does a large mini-batch fail without cross-device batch norm, or without a warmup?",
        "Sec. 4.1 and Table 2: 64 and 128 images failed with frozen statistics, even with a warmup; Sec. 4.2: with "
        "warmup and batch norm together all trainings easily converge.",
        "demo",
        "reproduce-demo",
        {
            **_ALIKE,
            "schedule.policy": "step",
            "schedule.milestones": [],
            "schedule.factors": [],
            "evaluation.every_epochs": 0,
            "checkpoint_epochs": 100,
        },
        rows,
        5,
        tuple(statements),
    )


def _failing_row(batch: int, bn_size: int, warmup: int, rate: float) -> str:
    return f"b{batch}-bn{bn_size}-w{warmup}-r{rate:g}"


def _large_batch() -> Claim:
    rows = {
        f"b{batch}-bn{bn_size}": {
            "batch_size": batch,
            "bn_size": bn_size,
            "schedule.warmup_steps": _WARMUP * 256 // batch,  # as many images for every row
        }
        for batch, bn_size in ((16, 0), (16, 16), (256, 16))
    }
    return Claim(
        "claim-large-batch",
        "Do 256 images reach what 16 reach in the same epochs, with linear scaling and cross-device batch norm?",
        "Table 3: 37.0 mmAP with 16 images and 37.1 with 256; Figures 1 and 4.",
        "demo",
        "reproduce-demo",
        {**_ALIKE, "schedule.warmup_start": 0.1},
        rows,
        3,
        (
            Scores("256 images score as much as 16", "b256-bn16", "b16-bn16", margin=2.0),
            Scores("batch norm scores more than frozen statistics, 16 images", "b16-bn16", "b16-bn0"),
        ),
        (8000, 1000),
    )


def _bn_size() -> Claim:
    return Claim(
        "claim-bn-size",
        "Does a BN size of 2 hurt, and does batch norm over 16 images beat frozen statistics?",
        "Table 3: 31.0 mmAP with a BN size of 2, 37.0 with 16; Table 2: 36.2 with frozen statistics.",
        "demo",
        "reproduce-demo",
        _ALIKE,
        {f"bn{size}": {"bn_size": size} for size in (0, 2, 4, 16)},
        3,
        (
            Scores("a BN size of 2 scores less than 16", "bn2", "bn16"),
            Scores("a BN size of 4 scores less than 16", "bn4", "bn16"),
            Scores("frozen statistics score less than a BN size of 16", "bn0", "bn16"),
        ),
    )


def _past_256() -> Claim:
    scalings: dict[str, dict[str, Any]] = {
        "linear": {},
        "sqrt": {"optimizer.scaling": "sqrt"},
        "lars": {"optimizer.kind": "lars", "optimizer.base_lr": 0.05, "optimizer.decay_norm_and_bias": False},
        "agvm": {"optimizer.agvm": True},
    }
    rows = {
        f"b{batch}-{name}": {"batch_size": batch, "schedule.warmup_steps": _WARMUP, **keys}
        for batch in (512, 1024)
        for name, keys in scalings.items()
    }
    return Claim(
        "past-256",
        "Where does each way of scaling the rate fail past 256 images?",
        "Not in the paper: its largest mini-batch has 256 images.",
        "demo",
        "reproduce-demo",
        {**_ALIKE, "schedule.warmup_start": 0.1},
        rows,
        1,
        tuple(
            Scores(
                f"{batch} images with {name} score more than with linear scaling",
                f"b{batch}-{name}",
                f"b{batch}-linear",
            )
            for batch in (512, 1024)
            for name in list(scalings)[1:]
        ),
        (8000, 1000),
    )


_FACTORS, _MARGIN = (2, 4, 8, 16), 0.25


def _variance() -> Claim:
    rows = {f"bn{size}": {"bn_size": size} for size in (0, 16)}
    return Claim(
        "claim-variance",
        "Does one update of rate k r from k N images vary as much as k updates of rate r from N images, all along a "
        "training?",
        "Sec. 3.2, Eq. 2 to 4, from which the linear scaling rule follows; N = 16 here.",
        "demo",
        "reproduce-demo",
        {
            **_ALIKE,
            "schedule.epochs": 20,
            "schedule.milestones": [15, 18],
            "evaluation.every_epochs": 20,
            "keep_every_epochs": 4,
            "keep_checkpoints": 1,
            "keep_best": False,
        },
        rows,
        3,
        tuple(
            Keeps(f"Eq. 4 holds for k = {factor}, {name}", row, factor, _MARGIN)
            for row, name in zip(rows, ("frozen statistics", "batch norm over 16"), strict=True)
            for factor in _FACTORS
        ),
        factors=_FACTORS,
    )


_FORKS, _FORK_IMAGES, _FORK_WARMUP = (16, 32, 64, 128, 256, 512), 20_000, 2_048


def _critical_batch() -> Claim:
    rows = {
        f"b{batch}": {"batch_size": batch, "schedule.warmup_steps": _FORK_WARMUP // batch if batch > _FORKS[0] else 0}
        for batch in _FORKS
    }
    return Claim(
        "critical-batch",
        "From one half-trained detector, up to which mini-batch do the same images bring as much, and does the "
        "gradient noise scale say so?",
        "Not in the paper: its Sec. 3.2 gives no limit; McCandlish et al. (2018) predict one from the noise scale.",
        "demo",
        "reproduce-demo",
        {
            **_ALIKE,
            "schedule.epochs": _FORK_IMAGES / _IMAGES,
            "schedule.milestones": [0.8 * _FORK_IMAGES / _IMAGES],
            "schedule.factors": [0.1],
            "evaluation.every_epochs": 0,
        },
        rows,
        3,
        tuple(
            Scores(f"{batch} images bring as much as {_FORKS[0]}", f"b{batch}", f"b{_FORKS[0]}", margin=2.0)
            for batch in _FORKS[1:]
        ),
        trunk={"schedule.epochs": 6, "schedule.milestones": [], "schedule.factors": []},
    )


def _real_photos() -> Claim:
    rows = {
        f"b{batch}-bn{bn_size}": {"batch_size": batch, "bn_size": bn_size, "schedule.warmup_steps": 15 * 16 // batch}
        for batch in (8, 16, 32, 64)
        for bn_size in (0, 8, 32)
        if bn_size <= batch
    }
    return Claim(
        "real-photos",
        "Does it hold on real photos (blood cells), with mini-batches of 8 to 64 images in the same epochs?",
        "Table 3, on COCO.",
        "bccd",
        "reproduce-bccd",
        {**_ALIKE, "schedule.warmup_start": 0.1},
        rows,
        3,
        (
            Scores("64 images score as much as 8, batch norm over 8", "b64-bn8", "b8-bn8", margin=2.0),
            Scores("64 images score more with batch norm over 32 than with frozen statistics", "b64-bn32", "b64-bn0"),
            Scores("a BN size of 32 scores more than 8, 64 images", "b64-bn32", "b64-bn8"),
        ),
    )


CLAIMS: Mapping[ClaimItem, Claim] = {
    claim.name: claim
    for claim in (
        _failing(),
        _large_batch(),
        _bn_size(),
        _variance(),
        _past_256(),
        _critical_batch(),
        _real_photos(),
    )
}
"""All of them, in the order in which they are worth running."""
