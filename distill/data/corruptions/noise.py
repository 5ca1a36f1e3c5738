"""Noise, drawn for every value of an image by itself."""

from __future__ import annotations

import functools

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.data.corruptions import draws
from distill.data.corruptions.draws import Key
from distill.data.corruptions.filters import Images

_BEYOND = 8  # standard deviations above the mean at which Poisson numbers end, and 20 more


def gaussian_noise(images: Images, key: Key, sigma: float) -> Images:
    """The image plus σ n, n standard normal."""
    return images + sigma * draws.normal(key, *images.shape[1:])


def speckle_noise(images: Images, key: Key, sigma: float) -> Images:
    """The image times 1 + σ n, n standard normal."""
    return images + sigma * images * draws.normal(key, *images.shape[1:])


def shot_noise(images: Images, key: Key, photons: float) -> Images:
    """Poisson(c x) / c, where c is the number of photons at full brightness.

    Inverted from uniform numbers: the least k at which the distribution function reaches u. Images
    have 256 levels, so that all distributions fit into one table, each shifted by its level.
    """
    level = (images * 255).round()
    shifted = _poisson(photons).to(images.device)
    place = torch.searchsorted(shifted.flatten(), draws.uniform(key, *images.shape[1:]) + level)
    return (place - level * shifted.shape[1]) / photons


@functools.lru_cache(maxsize=16)
def _poisson(photons: float) -> Float[Tensor, "256 K"]:
    """The level plus P(N ≤ k), N being Poisson of mean photons · level / 255."""
    mean = torch.arange(256, dtype=torch.float64)[:, None] * (photons / 255)
    k = torch.arange(int(photons + _BEYOND * np.sqrt(photons)) + 20, dtype=torch.float64)
    density = (torch.xlogy(k, mean) - mean - (k + 1).lgamma()).exp()
    reached = density.cumsum(dim=1)
    return reached / reached[:, -1:] + torch.arange(256)[:, None]


def impulse_noise(images: Images, key: Key, amount: float) -> Images:
    """A value becomes 0 or 1, with probability amount / 2 each."""
    u = draws.uniform(key, *images.shape[1:])
    return torch.where(u < amount, (u < amount / 2).double(), images)
