"""How sure a comparison of runs is: intervals, plateaus and sample-efficiency curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

RESAMPLES = 1000
_SEED = int.from_bytes(b"bootstrap", "big")
_CHUNK = 20_000_000  # counts of images that are held at once


class Estimate(NamedTuple):
    """A mean and what is known of it."""

    value: float
    ci95: tuple[float, float]  # percentile interval of the bootstrap
    se: float  # standard deviation of the bootstrap


def bootstrap(
    correct: Sequence[Bool[np.ndarray, "S N"]], *, resamples: int = RESAMPLES
) -> Float[np.ndarray, "settings R"]:
    """Mean accuracy of every setting in every resample, the same for all settings.

    Images are drawn with replacement, and seeds too where there are several; all settings see the
    same draws, so that what they have in common cancels in their differences. Draws have a fixed
    seed of their own.

    Args:
        correct: By setting: whether each image was right, a row a seed. All settings have the same
            images and the same number of seeds.
        resamples: How many are drawn.
    """
    seeds, images = correct[0].shape
    draw = np.random.default_rng(_SEED)
    stacked = np.stack(correct).astype(np.float64)
    found = []
    size = max(1, _CHUNK // images)
    for first in range(0, resamples, size):
        count = min(size, resamples - first)
        of_images = draw.multinomial(images, np.full(images, 1 / images), size=count)
        of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        by_seed = stacked @ of_images.T  # settings, seeds, resamples
        found.append(np.einsum("ksr,rs->kr", by_seed, of_seeds) / (seeds * images))
    return np.concatenate(found, axis=1)


def estimate(value: float, draws: Float[np.ndarray, " R"]) -> Estimate:
    """A value with the interval and the standard error that its resamples give."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(value), (float(low), float(high)), float(draws.std(ddof=1)))


def named(name: str, found: Estimate) -> dict[str, Any]:
    """An estimate as keys of a row."""
    return {name: found.value, f"{name}_ci95": list(found.ci95), f"{name}_se": found.se}


def plateau(
    values: Float[np.ndarray, " k"], draws: Float[np.ndarray, "k R"], best: int
) -> list[int]:
    """The settings that are within one standard error of the best.

    The standard error is that of the difference to the best on the same images and seeds (the
    one-standard-error rule of Breiman, Friedman, Olshen, Stone: Classification and Regression
    Trees, 1984, for paired runs).

    Returns:
        Their indices, the best among them.
    """
    spread = (draws[best] - draws).std(axis=1, ddof=1)
    gap = values[best] - values
    return [i for i in range(len(values)) if gap[i] <= spread[i] + 1e-12]


class Curve(NamedTuple):
    """Accuracy by number of training images."""

    sizes: Float[np.ndarray, " n"] | Int[np.ndarray, " n"]  # rising
    accuracy: Float[np.ndarray, " n"]


def area(curve: Curve) -> float:
    """Mean accuracy over the logarithm of the number of images.

    1 / log(n_K / n_1) · ∫ accuracy d log n, by trapezoids; with one size its accuracy.
    """
    if len(curve.sizes) == 1:
        return float(curve.accuracy[0])
    log_n = np.log(np.asarray(curve.sizes, np.float64))
    means = (curve.accuracy[1:] + curve.accuracy[:-1]) / 2
    return float((means * np.diff(log_n)).sum() / (log_n[-1] - log_n[0]))


def data_multiplier(curve: Curve, other: Curve) -> float | None:
    """How many times more images the other needs for the same accuracy, in the geometric mean.

    10 to the mean, over the accuracies that both reach, of log10 n_other(a) − log10 n(a), where
    n(a) is the number of images at which a curve reaches accuracy a: rising (isotonic)
    least-squares fits of both, linear in log n. It is the Bjøntegaard difference of video coding
    (VCEG-M33, 2001) with images in place of bits.

    Returns:
        Above 1: the first needs fewer images. None where they reach no accuracy in common.
    """
    ours, theirs = _inverse(curve), _inverse(other)
    low = max(ours[0][0], theirs[0][0])
    high = min(ours[0][-1], theirs[0][-1])
    if not low < high:
        return None
    # Both are piecewise linear in the accuracy: trapezoids between all their corners are exact.
    corners = np.unique(np.concatenate([[low, high], *(one[0] for one in (ours, theirs))]))
    corners = corners[(corners >= low) & (corners <= high)]
    gap = np.interp(corners, *theirs) - np.interp(corners, *ours)
    mean = float(((gap[1:] + gap[:-1]) / 2 * np.diff(corners)).sum() / (high - low))
    return float(10**mean)


def _inverse(curve: Curve) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Strictly rising accuracies and the log10 of the images at which each is first reached."""
    rising = isotonic(np.asarray(curve.accuracy, np.float64))
    accuracy, first = np.unique(rising, return_index=True)
    return accuracy, np.log10(np.asarray(curve.sizes, np.float64))[first]


def isotonic(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The rising sequence nearest to `values` in least squares, by pooling adjacent violators."""
    blocks: list[tuple[float, int]] = []  # mean and length
    for value in values:
        mean, length = float(value), 1
        while blocks and blocks[-1][0] >= mean:
            before, count = blocks.pop()
            mean = (before * count + mean * length) / (count + length)
            length += count
        blocks.append((mean, length))
    return np.concatenate([np.full(length, mean) for mean, length in blocks])
