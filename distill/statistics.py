"""How sure a comparison of runs is: intervals, plateaus and sample-efficiency curves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
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

    Args:
        correct: By setting: whether each image was right, a row a seed. All settings have the same
            images; those with the same number of seeds are paired in them too.
        resamples: How many are drawn.
    """
    return np.stack([resampled([one], _itself, resamples) for one in correct])


def resampled(
    values: Sequence[Bool[np.ndarray, "S N"] | Float[np.ndarray, "S N"]],
    statistic: Callable[[Float[np.ndarray, "k S R"]], Float[np.ndarray, "S R"]],
    resamples: int = RESAMPLES,
) -> Float[np.ndarray, " R"]:
    """A statistic of several means over images, in every resample; its mean over seeds.

    Images are drawn with replacement, and seeds too where there are several. Whatever is measured
    on as many images sees the same draws, so that what two measures have in common cancels in
    their difference. Draws have a fixed seed of their own.

    Args:
        values: Of every image, a row a seed.
        statistic: Takes the means of each of the values, gives one number a seed and resample.
        resamples: How many are drawn.
    """
    seeds, images = values[0].shape
    stacked = np.stack(values).astype(np.float64)
    by_seed = [statistic(stacked @ counts.T / images) for counts in _counts(images, resamples)]
    draw = np.random.default_rng((_SEED, seeds))
    of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    mean: np.ndarray = (np.concatenate(by_seed, axis=1).T * of_seeds).sum(axis=1) / seeds
    return mean


def _itself(means: Float[np.ndarray, "1 S R"]) -> Float[np.ndarray, "S R"]:
    only: np.ndarray = means[0]
    return only


def _counts(images: int, resamples: int) -> Iterator[Int[np.ndarray, "r N"]]:
    """How often each image is drawn, in pieces that fit into memory."""
    size = max(1, _CHUNK // images)
    for first in range(0, resamples, size):
        yield _drawn(images, first, min(size, resamples - first))


@functools.lru_cache(maxsize=2)  # many measures of the same images follow each other
def _drawn(images: int, first: int, count: int) -> Int[np.ndarray, "r N"]:
    draw = np.random.default_rng((_SEED, first))
    chosen = draw.integers(images, size=(count, images))
    rows = [np.bincount(row, minlength=images) for row in chosen]
    return np.stack(rows).astype(np.int32)


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
