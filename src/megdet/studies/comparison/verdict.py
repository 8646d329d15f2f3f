"""The meaning of a difference and its intervals, in plain words."""

from typing import Literal

Verdict = Literal["differ", "differ on these weights", "noise of images", "noise of seeds", "equal"]


def judge(
    names: tuple[str, str],
    difference: float,
    over_images: tuple[float, float],
    over_seeds: tuple[float, float] | None,
    seeds_needed: int | None,
    *,
    is_one_recipe: bool = False,
) -> tuple[Verdict, str]:
    """Whether the second of two groups differs from the first, and why, as a sentence or two.

    Numbers are AP, 0..1; the sentences have points, 0..100. `is_one_recipe`: they differ only in their seed.
    """
    first, second = names
    way = "more" if difference >= 0 else "less"
    what = f"{second} scores {abs(100 * difference):.1f} mmAP {way} than {first}"
    images = f"over images {_span(over_images)}"
    if difference == 0.0 and over_images == (0.0, 0.0):
        return "equal", f"{second} and {first} find the same."
    if not _leaves_out_zero(over_images):
        return "noise of images", f"{what}, which may be noise: {images}.{_needs(seeds_needed)}"
    if over_seeds is None and is_one_recipe:
        return (
            "differ on these weights",
            f"{what}, beyond the noise of images ({images}). Both are of one recipe: it is the seed, or luck.",
        )
    if over_seeds is None:
        return (
            "differ on these weights",
            f"{what}, beyond the noise of images ({images}). Of the recipes that says nothing yet: train two or "
            f"more seeds of each.{_needs(seeds_needed)}",
        )
    seeds = f"over seeds {_span(over_seeds)}"
    if not _leaves_out_zero(over_seeds):
        return "noise of seeds", f"{what}, which may be the luck of seeds: {images}, {seeds}.{_needs(seeds_needed)}"
    return "differ", f"{what}, beyond noise: {images}, {seeds}."


def _span(ends: tuple[float, float]) -> str:
    """An interval of a difference in points, with signs."""
    return f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}"


def _leaves_out_zero(ends: tuple[float, float]) -> bool:
    return ends[0] > 0.0 or ends[1] < 0.0


def _needs(seeds: int | None) -> str:
    if seeds is None:
        return ""
    return f" With {seeds} seeds of each, a difference of this size would be found in 8 of 10 cases."
