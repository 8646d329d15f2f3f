"""Statistics from inner products of gradients: variances of mini-batches, their errors, the gradient noise scale.

A Gram matrix holds the inner products of the gradients of sampling units (images, or groups of images) in the order in
which they were drawn. The gradient of a mini-batch is the mean over consecutive units. So its inner products are block
means of the matrix, and no gradient has to be kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; twice the error is a confidence of 95% (see `jackknife`)."""

    value: float
    error: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"value": self.value, "error": self.error}

    def __str__(self) -> str:
        return f"{_plain(self.value, 3)} ± {_plain(self.error, 2)}"


def _plain(number: float, digits: int) -> str:
    """So many significant digits, without an exponent if that is readable."""
    if number and not 1e-7 < abs(number) < 1e7:
        return f"{number:.{digits}g}"
    return np.format_float_positional(float(f"{number:.{digits}g}"), trim="-")


def batch_gram(gram: Float[np.ndarray, "units units"], size: int) -> Numbers:
    """The Gram matrix of the gradients of disjoint mini-batches of `size` units; units left over are left out."""
    count = len(gram) // size
    blocks = gram[: count * size, : count * size].reshape(count, size, count, size)
    means: Numbers = blocks.mean(axis=(1, 3))
    return means


def total_variance(gram: Float[np.ndarray, "samples samples"]) -> float:
    """Unbiased trace of the covariance of at least two independent samples: the sum of all parameters' variances."""
    count = len(gram)
    return float((np.trace(gram) - gram.sum() / count) / (count - 1))


def batch_variance(gram: Float[np.ndarray, "units units"], size: int) -> float:
    """The variance of the gradient of a mini-batch of `size` units, from disjoint mini-batches (Sec. 3.2, Eq. 2)."""
    return total_variance(batch_gram(gram, size))


def jackknife(
    gram: Float[np.ndarray, "units units"], block: int, statistic: Callable[[Numbers], Numbers]
) -> list[Estimate]:
    """The numbers of a statistic, each with the standard error of a jackknife that leaves blocks of units out.

    A block is `block` units, so that similar units of a block do not count as independent. At least three blocks are
    needed; units after the last whole block are left out. Errors are `few_blocks` times the jackknife's.
    """
    count = len(gram) // block
    whole = gram[: count * block, : count * block]
    values = statistic(whole)
    without = []
    for number in range(count):
        kept = np.r_[0 : number * block, (number + 1) * block : count * block]
        without.append(statistic(whole[np.ix_(kept, kept)]))
    spread = np.array(without) - np.mean(without, axis=0)
    errors = few_blocks(count) * np.sqrt((count - 1) / count * np.square(spread).sum(axis=0))
    return [Estimate(float(value), float(error)) for value, error in zip(values, errors, strict=True)]


def few_blocks(count: int) -> float:
    """The factor that widens an error from so few blocks, at least three: Student's t over the normal's, at two sigma.

    Twice the error then covers 95.4%, as with many blocks. The quantile for count - 1 degrees of freedom is from
    Abramowitz and Stegun (1964), 26.7.5; from three degrees on it is exact to 0.2%.
    """
    z, freedom = 2.0, count - 1
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    wider = sum(term / math.pow(freedom, power) for power, term in enumerate(terms, 1))
    return 1 + wider / z


@dataclass(frozen=True)
class NoiseEstimate:
    """The simple gradient noise scale B = tr(S) / |G|^2 of McCandlish et al. (2018), Eq. 2.9, in images.

    G is the true gradient and S the covariance of the gradient of one image.
    """

    signal: Estimate
    """|G|^2; the estimate may be negative"""
    noise: Estimate
    """tr(S)"""
    inverse: Estimate
    """1 / B; its error is well behaved even for a weak signal"""

    @property
    def is_resolved(self) -> bool:
        """Whether the signal is above twice its error; if not, the scale needs more images."""
        return self.inverse.value > 2 * self.inverse.error

    @property
    def scale(self) -> Estimate | None:
        """B in images, None if the signal is not above 0."""
        if self.inverse.value <= 0:
            return None
        return Estimate(1 / self.inverse.value, self.inverse.error / self.inverse.value**2)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "signal": self.signal.as_dict(),
            "noise": self.noise.as_dict(),
            "scale": None if self.scale is None else self.scale.as_dict(),
            "is_resolved": self.is_resolved,
        }


def noise_of_two_batches(gram: Numbers, small: int, large: int, unit_images: int) -> NoiseEstimate:
    """The unbiased estimators of Appendix A.1 of McCandlish et al. (2018), from mini-batches of two sizes in units.

    |G|^2 = (B |G_B|^2 - b |G_b|^2) / (B - b) and tr(S) = (|G_b|^2 - |G_B|^2) / (1/b - 1/B), with b and B in images.
    """
    b, big = small * unit_images, large * unit_images

    def estimators(part: Numbers) -> Numbers:
        of_small, of_large = (float(np.diag(batch_gram(part, size)).mean()) for size in (small, large))
        signal = (big * of_large - b * of_small) / (big - b)
        noise = (of_small - of_large) / (1 / b - 1 / big)
        return _with_inverse(signal, noise)

    return NoiseEstimate(*jackknife(gram, large, estimators))


def noise_of_units(gram: Numbers, block: int, unit_images: int) -> NoiseEstimate:
    """The direct estimate: the sample variance of the units, and the squared mean minus its noise.

    For the error, `block` units are left out together.
    """

    def estimators(part: Numbers) -> Numbers:
        variance = total_variance(part)
        signal = float(part.mean()) - variance / len(part)
        return _with_inverse(signal, variance * unit_images)

    return NoiseEstimate(*jackknife(gram, block, estimators))


def _with_inverse(signal: float, noise: float) -> Numbers:
    return np.array([signal, noise, signal / noise if noise > 0 else np.nan])
