"""Proof that results do not depend on the devices: a recipe is trained on several numbers of devices and compared.

The difference of two tensors is max|a - b| / max(max|a|, 1e-6), where a is the run on the first count. In float64
everything that a step changes agrees to 1e-9 after all steps. In float32 the first step's losses and gradients agree to
1e-4; later steps are only reported, because a near-tie in NMS or top-k may flip. With `exact` every bit is the same in
every number format, and a SHA-256 says so. A value that is not finite, a trained
tensor that did not move, and ranks that differ are failures.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megdet.contract.cases import cases_of
from megdet.contract.run import Leak, Trained, Training, run_steps
from megdet.contract.trials import LeftOut, Trial, left_out, trials, write_weights
from megdet.data.rle import Rle, decode_mask
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.inference.predict import Result
from megdet.recipe import Recipe
from megdet.run_folder.folder import encode_non_finite
from megdet.runtime import num_gpus
from megdet.training.datasets import load_datasets

Format = Literal["float64", "float32", "bfloat16"]
LIMITS: dict[Format, float] = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.0}
DEVICES = (1, 2, 3, 4, 8)
STEPS = 20
_SMALLEST = 1e-6
_HANGS_AFTER = 3600.0


@dataclass(frozen=True)
class Comparison:
    """The result of comparing one layout of one case."""

    case: str
    devices: int
    stopped_on: int | None
    """the devices of the first half, if the run was stopped half-way"""
    lane_width: int
    rounds: int
    difference: float
    """the largest difference that counts for the verdict"""
    where: str
    later_difference: float | None
    """the largest difference that is only reported: in float32, after the first step"""
    fault: str
    """the first fault, or "" """
    of_kind: dict[str, float]
    """largest difference of gradient, reported, rate, weights, buffers, momentum, averages, agvm, noise, watch, ..."""
    compared_with: Literal["nothing", "same layout", "another layout"] = "another layout"
    """`nothing` is for the reference, which can only have faults of its own"""
    sha256: str = ""
    """of weights, buffers, momentum and all other state, and of the detections, where the recipe is exact"""

    @property
    def passes(self) -> bool:
        """Whether the layout keeps the contract."""
        return not self.fault


@dataclass(frozen=True)
class Verdict:
    """The results of `verify`."""

    rows: list[Comparison]
    limit: float
    left_out: Sequence[LeftOut] = ()

    @property
    def passes(self) -> bool:
        """Whether every layout keeps the contract."""
        return all(row.passes for row in self.rows)

    @property
    def worst(self) -> Comparison:
        """The row with the largest difference."""
        return max(self.rows, key=lambda row: row.difference)

    def count(self, compared_with: str) -> int:
        """Number of runs with this value of `compared_with`."""
        return sum(row.compared_with == compared_with for row in self.rows)

    def sentence(self) -> str:
        """The verdict in one line, with the first tensor that differs."""
        failed = [row for row in self.rows if not row.passes]
        if failed:
            where = f"case {failed[0].case} on {failed[0].devices} device(s)"
            hint = "" if self.limit < 1e-6 else "; in float32 this may be a ReLU within rounding of 0, try float64"
            return f"fail: {len(failed)} of {len(self.rows)} runs; {where}: {failed[0].fault}{hint}"
        worst, same = self.worst, self.count("same layout")
        compared = f"{self.count('another layout')} runs compared with another layout"
        compared += f", {same} with the same layout" if same else ""
        if self.sha256:
            return f"pass: {compared}; difference 0, every bit is the same; SHA-256 {self.sha256}"
        return (
            f"pass: {compared}; the largest relative difference is {worst.difference:.2g}, allowed {self.limit:g} "
            f"({worst.where or 'nowhere'}; case {worst.case} on {worst.devices} device(s))"
        )

    @property
    def sha256(self) -> str:
        """Of the SHA-256 of all cases, where the recipe is exact."""
        found = {row.case: row.sha256 for row in self.rows if row.sha256}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else ""

    def as_dict(self) -> dict[str, Any]:
        """For strict JSON: an infinite difference is the string Infinity."""
        names = {"difference": "largest_relative_difference", "later_difference": "later_relative_difference"}
        layouts = [
            {names.get(key, key): value for key, value in asdict(row).items() if value or key != "sha256"}
            | {"pass": row.passes}
            for row in self.rows
        ]
        found = {
            "pass": self.passes,
            "largest_relative_difference": self.worst.difference,
            "limit": self.limit,
            **({"sha256": self.sha256} if self.sha256 else {}),
            "compared_with_another_layout": self.count("another layout"),
            "layouts": layouts,
            "left_out": [asdict(own) for own in self.left_out],
        }
        return dict(encode_non_finite(found))


def verify(
    recipe: Recipe,
    devices: Sequence[int] = DEVICES,
    *,
    cases: Sequence[str] = ("base",),
    steps: int = STEPS,
    lane_width: int | None = None,
    dtype: Format = "float64",
    exact: bool = False,
    break_with: Leak | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Verdict:
    """Train the cases on the device counts, each run in new processes, and compare them with the first count.

    Args:
        recipe: the base of all cases; its precision is replaced by `dtype`.
        devices: counts of ranks; the first is the reference.
        cases: names out of `cases_of(recipe)`.
        steps: optimizer steps of a run.
        lane_width: force it (except on the first count, if it does not divide that).
        dtype: the dtype of the arithmetic; it also sets the limit. bfloat16 goes with `exact` only.
        exact: train with `exact: true` and allow no difference in one bit.
        break_with: applied to every trainer before its first step; a control that must fail.
        progress: called with a line after every run.

    Raises:
        InputError: the recipe, its data or a layout is impossible.
        RankError: a rank raised or died.
    """
    if "WORLD_SIZE" in os.environ:
        raise InputError("verify starts its processes itself: run it without torchrun")
    if not devices or len(set(devices)) < len(devices) or min(devices) < 1:
        raise InputError(f"devices {', '.join(map(str, devices))}: name different counts of at least 1")
    if steps < 1:
        raise InputError(f"{steps} steps: it takes at least one")
    if dtype == "bfloat16" and not exact:
        raise InputError("--dtype bfloat16: sums in another order differ too much to be judged; verify it with --exact")
    recipe = replace(recipe, precision=dtype, exact=exact)
    with tempfile.TemporaryDirectory(prefix="megdet_verify_") as folder:
        planned = trials(recipe, cases, devices, steps, lane_width, Path(folder))
        alone = World(0, 1, torch.device("cpu"))
        load_datasets(recipe, alone)  # draws missing demo data, and checks the others
        if any(cases_of(recipe)[name].has_weights for name in cases):
            plain = replace(recipe, data=replace(recipe.data, image_weights=""))
            write_weights(Path(folder), load_datasets(plain, alone).train.file_names, recipe.batch_size)
        rows = list(_rows(planned, dtype, break_with, progress))
        return Verdict(rows, 0.0 if exact else LIMITS[dtype], left_out(recipe, planned, cases, devices))


def _rows(
    planned: Sequence[Trial], dtype: Format, leak: Leak | None, progress: Callable[[str], None]
) -> Iterator[Comparison]:
    most = max(run.ranks for trial in planned for run in (*trial.runs, *trial.reference))
    device = "cuda" if num_gpus() >= most else "cpu"
    kept: dict[tuple[Training, ...], Trained] = {}
    references = {trial.reference for trial in planned}

    def trained_by(runs: tuple[Training, ...], case: str) -> Trained:
        if runs in kept:
            return kept[runs]
        started = time.perf_counter()
        halves = [run_in_ranks(run_steps, run.ranks, run, leak, timeout=_HANGS_AFTER, device=device)[0] for run in runs]
        counts = ", then ".join(str(run.ranks) for run in runs)
        progress(f"{case} on {counts} device(s): {time.perf_counter() - started:.1f} s")
        joined = _joined(halves)
        if runs in references:
            kept[runs] = joined
        return joined

    for trial in planned:
        reference = trained_by(trial.reference, trial.case)
        yield _judge(trial, reference, trained_by(trial.runs, trial.case), dtype)


def _joined(halves: Sequence[Trained]) -> Trained:
    """The halves of a stopped run as one run."""
    first, last = halves[0], halves[-1]
    return replace(
        last,
        gradients=first.gradients,
        reported=[row for half in halves for row in half.reported],
        rates=[rate for half in halves for rate in half.rates],
        unmoved=[name for name in first.unmoved if all(name in half.unmoved for half in halves)],
        drifted=[rank for half in halves for rank in half.drifted],
    )


@dataclass(frozen=True)
class _Difference:
    kind: str
    where: str
    value: float
    is_of_first_step: bool = False

    @property
    def is_broken(self) -> bool:
        """Whether a number is not finite or a tensor is missing; a different list of detections does not count."""
        return self.value == math.inf and self.kind != "detections"


def _judge(trial: Trial, reference: Trained, trained: Trained, dtype: Format) -> Comparison:
    run = trial.runs[-1]
    is_exact = run.recipe.exact
    is_bitwise = trial.is_bitwise or is_exact
    limit = 0.0 if is_bitwise else LIMITS[dtype]
    found = list(_differences(reference, trained))
    judges_all = dtype == "float64" or is_bitwise
    # a near-tie may change the list of detections, but cannot make a number infinite
    judged = [own for own in found if judges_all or own.is_of_first_step or own.is_broken]
    later = [own.value for own in found if not (judges_all or own.is_of_first_step or own.value == math.inf)]
    worst = max(judged, key=lambda own: own.value)
    fault = _fault(trained, judged, limit)
    if is_exact and not fault and reference.sha256() != trained.sha256():
        fault = "the SHA-256 is another, though no number differs"
    of_kind: dict[str, float] = {}
    for own in found:
        of_kind[own.kind] = max(of_kind.get(own.kind, 0.0), own.value)
    return Comparison(
        trial.case,
        run.ranks,
        trial.runs[0].ranks if len(trial.runs) > 1 else None,
        run.layout.lane_width,
        run.layout.rounds,
        worst.value,
        worst.where if worst.value else "",
        max(later, default=None),
        fault,
        of_kind,
        "nothing" if trial.runs == trial.reference else "another layout" if trial.has_other_layout else "same layout",
        trained.sha256() if is_exact else "",
    )


def _fault(trained: Trained, judged: Sequence[_Difference], limit: float) -> str:
    if trained.drifted:
        return f"rank {trained.drifted[0]} holds other weights or buffers than rank 0"
    for own in judged:
        if own.value > limit:
            if own.value == math.inf:
                return f"{own.where} is not finite, or missing, or of another shape"
            return f"{own.where} differs by {own.value:.2g}, allowed {limit:g}"
    if trained.unmoved and not any(trained.rates):
        return "the learning rate is 0 in every step, so nothing moved: ask for more steps"
    if trained.unmoved:
        others = f", nor did {len(trained.unmoved) - 1} other trained tensor(s)" if trained.unmoved[1:] else ""
        return f"{trained.unmoved[0]} did not move{others}"
    return ""


def _differences(reference: Trained, trained: Trained) -> Iterator[_Difference]:
    """All differences of two runs, in the order of the computation."""
    for name, value in tensor_differences(reference.gradients, trained.gradients):
        yield _Difference("gradient", f"gradient.{name}", value, True)
    for step, (ours, theirs) in enumerate(zip(reference.reported, trained.reported, strict=True), 1):
        for name, value in tensor_differences(ours, theirs):
            yield _Difference("reported", f"step {step}: {name}", value, step == 1)
    rates = torch.tensor([reference.rates, trained.rates], dtype=torch.float64)
    yield _Difference("rate", "learning rate", relative_difference(*rates), True)
    for name, value in tensor_differences(reference.state, trained.state):
        yield _Difference(name.split(".", 1)[0], name, value)
    for what, value in of_detections(reference.detections, trained.detections):
        yield _Difference("detections", f"detections: {what}", value)


def tensor_differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """The relative difference of every tensor of two runs, by name; infinite if only one run has it."""
    for name in {**ours, **theirs}:
        both = name in ours and name in theirs
        yield name, relative_difference(ours[name], theirs[name]) if both else math.inf


def of_detections(ours: Sequence[Result], theirs: Sequence[Result]) -> Iterator[tuple[str, float]]:
    """Differences of two lists of detections, by what is compared; infinite if the objects are different."""
    identities = [[(own["image_id"], own["category_id"]) for own in found] for found in (ours, theirs)]
    if identities[0] != identities[1]:
        yield "images and categories", math.inf
        return
    for key in ("bbox", "score"):
        values = (torch.tensor([own[key] for own in found], dtype=torch.float64) for found in (ours, theirs))
        yield key, relative_difference(*values)
    masks = [(own.get("segmentation"), their.get("segmentation")) for own, their in zip(ours, theirs, strict=True)]
    yield "segmentation", max((_apart(*pair) for pair in masks), default=0.0)


def _apart(ours: Rle | None, theirs: Rle | None) -> float:
    """The part of an image's pixels at which two masks differ; infinite where one of them is missing."""
    if ours is None or theirs is None or ours["size"] != theirs["size"]:
        return 0.0 if ours is theirs else math.inf
    return 0.0 if ours == theirs else float((decode_mask(ours) != decode_mask(theirs)).mean())


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """max|a - b| / max(max|a|, 1e-6), as in the contract; infinite if a value is not finite."""
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return math.inf
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=_SMALLEST)) if ours.numel() else 0.0
