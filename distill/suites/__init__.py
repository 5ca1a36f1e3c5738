"""What `distill evaluate` measures, a suite a module, each on all networks at once.

A suite has one function, `measure`, from what is evaluated to what was found. Numbers come by
measure, with their intervals; tables hold what plots are drawn from.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8
from torch import Tensor

from distill import statistics
from distill.definitions import Number

PALETTE = 128 * 128  # pixels


class Image(NamedTuple):
    """A picture for people."""

    png: bytes
    lines: tuple[str, ...]  # what is said of it


class Found(NamedTuple):
    """What a suite says of one subject."""

    numbers: dict[str, Number]  # by measure
    tables: dict[str, Any]  # plain data, by name
    images: dict[str, list[Image]]  # by what they show
    per_image: dict[str, list[np.ndarray]] = {}  # noqa: RUF012 (never written to)


def nothing(reason: str, *names: str) -> Found:
    """That these measures are not defined, and why."""
    return Found({name: Number(None, reason=reason) for name in names}, {}, {})


def merged(parts: Sequence[Found]) -> Found:
    """Several findings on one subject as one."""
    whole = Found({}, {}, {}, {})
    for part in parts:
        whole.numbers.update(part.numbers)
        whole.tables.update(part.tables)
        whole.images.update(part.images)
        whole.per_image.update(part.per_image)
    return whole


def mean(values: Sequence[np.ndarray]) -> Number:
    """The mean over images of what was measured on each, and over seeds, with its interval.

    Args:
        values: Of every image, one array a seed.
    """
    return ratio(values, None)


def ratio(above: Sequence[np.ndarray], below: Sequence[np.ndarray] | None) -> Number:
    """The mean of the one over that of the other, on the same images.

    Args:
        above: Of every image, one array a seed.
        below: Likewise; left out, it is 1. A ratio of counts is that of indicators.
    """
    rows = [np.stack(above)] + ([np.stack(below)] if below is not None else [])
    seeds, images = rows[0].shape
    means = [row.astype(np.float64).mean(axis=1) for row in rows]
    if below is not None and not means[1].all():
        return Number(None, seeds=seeds, reason="there is no image of which it could be said")

    def of(parts: Float[np.ndarray, "k S R"]) -> Float[np.ndarray, "S R"]:
        found: np.ndarray = parts[0] if len(parts) == 1 else parts[0] / np.maximum(parts[1], 1e-300)
        return found

    value = float(np.mean(means[0] if below is None else means[0] / means[1]))
    return interval(value, statistics.resampled(rows, of), n=images, seeds=seeds)


def interval(
    value: float, draws: Float[np.ndarray, " R"], *, n: int, seeds: int, least: float = -np.inf
) -> Number:
    """A number with the percentile interval of its resamples, of those in which it is defined."""
    low, high = np.maximum(np.nanquantile(draws, [0.025, 0.975]), least)
    return Number(value, (float(low), float(high)), n, seeds)


def centred(value: float, draws: Float[np.ndarray, " R"], *, n: int, seeds: int) -> Number:
    """A number whose resamples are biased, such as a calibration error: they are moved to it."""
    return interval(value, draws - draws.mean() + value, n=n, seeds=seeds, least=0.0)


def spread(values: Sequence[float], *, n: int | None = None) -> Number:
    """The mean of what several draws gave, with the normal interval of that mean."""
    found = np.asarray(values, np.float64)
    value = float(found.mean())
    if len(found) < 2:
        return Number(value, n=n)
    half = 1.96 * float(found.std(ddof=1)) / np.sqrt(len(found))
    return Number(value, (value - half, value + half), n)


def as_bytes(image: Float[Tensor, "3 H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """An image in [0, 1] as pixels."""
    pixels: np.ndarray = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return pixels


def png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """The image as a PNG file; with a palette where it has more than so many pixels."""
    file, image = io.BytesIO(), PIL.Image.fromarray(pixels)
    if image.width * image.height > PALETTE:  # else a page of many would be large
        image = image.quantize(256, dither=PIL.Image.Dither.NONE)
    image.save(file, "PNG")
    return file.getvalue()
