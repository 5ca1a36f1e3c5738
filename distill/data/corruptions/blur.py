"""Blur, as lenses, motion and frosted glass make it."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from distill.data.corruptions import draws, filters
from distill.data.corruptions.draws import Key
from distill.data.corruptions.filters import Images

_DOUBLINGS = 7  # a chain of 2^7 pixels comes with probability < 2^-128


def gaussian_blur(images: Images, key: Key, sigma: float) -> Images:
    """A Gaussian of σ pixels."""
    return filters.gaussian(images, sigma)


def defocus_blur(images: Images, key: Key, radius: float, sigma: float) -> Images:
    """A disc of `radius` pixels, its edge softened by a Gaussian of σ pixels."""
    return filters.correlate(images, _disc(radius, sigma).to(images.device), border="mirror")


@functools.lru_cache(maxsize=16)
def _disc(radius: float, sigma: float) -> Float[Tensor, "1 1 k k"]:
    """The softening reaches 1 pixel, 2 for discs of more than 8 pixels."""
    size, reach = (8, 1) if radius <= 8 else (int(radius), 2)
    y, x = np.mgrid[-size : size + 1, -size : size + 1]
    disc = torch.from_numpy((x**2 + y**2 <= radius**2).astype(np.float64))[None, None]
    return filters.gaussian(disc / disc.sum(), sigma, border="mirror", truncate=reach / sigma)


def motion_blur(images: Images, key: Key, radius: int, sigma: float) -> Images:
    """Smeared to one side, up or down by at most 45 degrees."""
    angle = draws.uniform(key) * 90 - 45
    return filters.motion(images, angle, radius, sigma)


def zoom_blur(images: Images, key: Key, stop: float, step: float) -> Images:
    """The mean of the image and of itself enlarged by 1, 1 + step, … below `stop`."""
    factors = np.arange(1, stop, step)
    return (images + sum(zoomed(images, factor) for factor in factors)) / (len(factors) + 1)


def zoomed(planes: Float[Tensor, "B C H W"], factor: float) -> Float[Tensor, "B C H W"]:
    """The middle of the planes, enlarged linearly to their size.

    Corners fall on corners: ⌈n / factor⌉ pixels become that times the factor, rounded, of which the
    middle n are kept.
    """
    sides = planes.shape[-2:]
    cut = [math.ceil(n / factor) for n in sides]
    whole = [round(n * factor) for n in cut]
    top, left = ((n - m) // 2 for n, m in zip(sides, cut, strict=True))
    part = planes[..., top : top + cut[0], left : left + cut[1]]
    large = F.interpolate(part, whole, mode="bilinear", align_corners=True)
    top, left = ((m - n) // 2 for n, m in zip(sides, whole, strict=True))
    return large[..., top : top + sides[0], left : left + sides[1]]


def glass_blur(images: Images, key: Key, sigma: float, reach: int, rounds: int) -> Images:
    """Blurred, pixels taken from nearby at random, blurred again.

    The published loop goes through the pixels from the last to the first, and gives each the value
    that a random one of those at −reach … reach − 1 rows and columns from it then has. (It means to
    swap the two; the other one keeps its value, since numpy hands out views.) A pixel that looks
    ahead thus finds what was put there before: a chain, of which all pixels find the end at once by
    doubling the steps that they look along it.

    Args:
        images: The images.
        key: Their keys.
        sigma: σ of both blurs in pixels.
        reach: In pixels.
        rounds: How often all pixels are moved.
    """
    soft = (filters.gaussian(images, sigma) * 255).round() / 255
    for number in range(rounds):
        source = _sources(images, key, reach, stream=number)
        soft = soft.flatten(2).gather(2, source[:, None].expand(-1, 3, -1)).view_as(images)
    return filters.gaussian(soft, sigma)


def _sources(images: Images, key: Key, reach: int, *, stream: int) -> Int64[Tensor, "B N"]:
    """Where each pixel's value comes from in a round."""
    height, width = images.shape[-2:]
    row, column = torch.meshgrid(
        *(torch.arange(n, device=images.device) for n in (height, width)), indexing="ij"
    )
    shift = (draws.uniform(key, 2, height, width, stream=stream) * (2 * reach)).long() - reach
    moved = (row > reach) & (row <= height - reach) & (column > reach) & (column <= width - reach)
    place = row * width + column
    source = torch.where(moved, place + shift[:, 0] * width + shift[:, 1], place).flatten(1)
    # Whether the source was filled before, in the same round: with probability < 1/2.
    chained = (source > place.flatten()) & moved.flatten().take(source)
    for _ in range(_DOUBLINGS):
        further = chained & chained.gather(1, source)
        source = torch.where(chained, source.gather(1, source), source)
        chained = further
    return source
