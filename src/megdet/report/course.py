"""How a run went, for drawing: losses, rate, speed and scores over epochs and hours, and what it has survived."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.run_length import decay_of

_MOST_POINTS = 240
"""Of a line; the mean of neighbouring steps is drawn."""
_NO_LOSS = {"step", "epoch", "learning_rate", "loss", "gradient_norm", "seconds", "data_seconds", "peak_memory_bytes"}
_SCORES = {"mmAP": "AP", "AP50": "AP50", "mmAR": "AR100"}
_FAULTS = {
    "left_out": "updates left out",
    "rolled_back": "roll-backs",
    "replaced": "images replaced",
    "loading_restarts": "loading processes that died",
    "repeated_for_memory": "parts of steps made again for want of memory",
}


def course_of(
    metrics: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    source: str = "metrics.jsonl",
    out_of: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The lines of `metrics.jsonl` as the page draws them: values over `epochs` and `hours`.

    Hours are those of steps and evaluations, without what a stopped run did not do. An empty run has empty lists.
    `out_of` says of each count of positive samples out of how many it is. Raises InputError, naming `source` and the
    step, for a line that is not one of a training.
    """
    for line in metrics:
        if not _is_sound(line):
            raise InputError(f"{source}: a line of step {line['step']} is none that a training writes; remove it")
    steps, evaluations, seconds = [], [], 0.0
    for line in metrics:
        seconds += line["seconds"] if isinstance(line.get("seconds"), float | int) else 0.0
        if "loss" in line:
            steps.append((seconds / 3600, line))
        elif "evaluation" in line:
            # one beside the training comes when later steps are done
            epoch = next((own["epoch"] for _, own in reversed(steps) if own["step"] <= line["step"]), 0.0)
            evaluations.append({"epoch": epoch, "hours": seconds / 3600} | _scores(line["evaluation"]))
    epochs = np.array([line["epoch"] for _, line in steps], np.float64)
    hours = np.array([hour for hour, _ in steps], np.float64)
    return {
        "epochs": _thinned(epochs),
        "hours": _thinned(hours),
        "reached": float(epochs[-1]) if len(epochs) else 0.0,
        "charts": [chart for chart in _charts([line for _, line in steps], recipe, out_of or {}) if chart["lines"]],
        "evaluations": evaluations,
        "decays": [
            {"epoch": epoch, "hours": float(np.interp(epoch, epochs, hours))}
            for epoch in decay_of(recipe.schedule).milestones
            if len(epochs) and epoch < epochs[-1]
        ],
        "faults": [{"what": what, "times": times} for what, times in _faults(metrics)],
        "seconds": seconds,
        "images_per_second": _images_per_second([line for _, line in steps], recipe),
        "noise": [
            {"epoch": line["epoch"], "hours": hour, "images": line["noise"]["model"]["scale"]}
            for hour, line in steps
            if isinstance(line.get("noise"), dict) and math.isfinite(line["noise"]["model"]["scale"])
        ],
    }


def _is_sound(line: Mapping[str, Any]) -> bool:
    """Whether a line has the numbers that a line of its kind must have."""
    if "loss" in line:
        noise = line.get("noise", {"model": {"scale": 1.0}})
        is_noise = isinstance(noise, dict) and isinstance(noise.get("model"), dict)
        return (
            all(_is_number(line.get(key)) for key in ("loss", "epoch", "learning_rate", "seconds"))
            and math.isfinite(line["epoch"])
            and is_noise
            and _is_number(noise["model"].get("scale"))
        )
    if "evaluation" in line:
        kinds = line["evaluation"]
        if not isinstance(kinds, dict) or "bbox" not in kinds:
            return False
        needed = [kinds[kind] for kind in ("bbox", "segm") if kind in kinds]
        return all(
            isinstance(own, dict) and all(_is_number(own.get(key)) for key in _SCORES.values()) for own in needed
        )
    return True


def _charts(
    lines: Sequence[Mapping[str, Any]], recipe: Recipe, out_of: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """One chart a subject, each with named lines."""
    numbers = [key for key in (lines[-1] if lines else {}) if _is_number(lines[-1][key])]
    counts = [key for key in numbers if key.endswith("_positive")]
    terms = [key for key in numbers if key not in _NO_LOSS and key not in counts]
    yield _chart("Loss", "", lines, ["loss", *terms])
    yield _chart("Learning rate", "", lines, ["learning_rate"])
    speed = [{"images a second": recipe.batch_size / line["seconds"]} for line in lines if line.get("seconds")]
    yield _chart("Images a second", "", speed if len(speed) == len(lines) else [], ["images a second"])
    for key in counts:
        title = f"Positive samples of the {key.removesuffix('_positive').replace('_', ' ')}"
        if out_of.get(key):
            parts = [{key: line[key] / out_of[key]} if _is_number(line.get(key)) else {} for line in lines]
            yield _chart(title, "as a part of 1", parts, [key])
        else:
            yield _chart(title, "", lines, [key])
    yield _chart("Norm of the gradient", "before clipping", lines, ["gradient_norm"])
    memory = [{"GiB": line["peak_memory_bytes"] / 2**30} for line in lines if line.get("peak_memory_bytes")]
    yield _chart("Memory", "GiB at most", memory if len(memory) == len(lines) else [], ["GiB"])


def _chart(title: str, unit: str, lines: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    shown = {}
    for key in keys:
        values = np.array([line[key] if _is_number(line.get(key)) else np.nan for line in lines], np.float64)
        if np.isfinite(values).any():
            shown[key.replace("_", " ")] = _thinned(values)
    return {"title": title, "unit": unit, "lines": shown}


def _thinned(values: NDArray[np.float64]) -> list[float | None]:
    """Means of neighbouring values, so that few enough are left; None where none is finite."""
    pieces = np.array_split(values, min(len(values), _MOST_POINTS)) if len(values) else []
    means = (piece[np.isfinite(piece)] for piece in pieces)
    return [float(f"{own.mean():.6g}") if len(own) else None for own in means]


def _scores(evaluation: Mapping[str, Any]) -> dict[str, float]:
    found = {name: evaluation["bbox"][key] for name, key in _SCORES.items()}
    return found | ({"mask mmAP": evaluation["segm"]["AP"]} if "segm" in evaluation else {})


def _images_per_second(lines: Sequence[Mapping[str, Any]], recipe: Recipe) -> float | None:
    total = sum(line.get("seconds", 0.0) for line in lines)
    return recipe.batch_size * len(lines) / total if total else None


def _faults(metrics: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    for key, what in _FAULTS.items():
        times = sum(
            line[key] if _is_number(line[key]) else len(line[key]) if isinstance(line[key], list) else 1
            for line in metrics
            if key in line
        )
        if times:
            yield what, int(times)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
