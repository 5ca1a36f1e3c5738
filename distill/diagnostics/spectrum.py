"""Whether layers smooth their features over the image or sharpen them.

Park, Kim: How Do Vision Transformers Work?, 2022, arXiv:2202.06709.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from distill.diagnostics import UndefinedError
from distill.diagnostics.tapped import MOST, opened
from distill.models.network import Network
from distill.types import Site

_FLOOR = 1e-6  # of amplitudes, as in the published code: a dead channel has no logarithm


class Spectrum(NamedTuple):
    """How the features of a site vary over its grid, by image."""

    site: Site
    variance: Float[Tensor, " N"]  # over the cells, mean over channels
    frequency: Float[Tensor, " F"]  # from 0 to the grid's highest, in units of π
    amplitude: Float[Tensor, "N F"]  # log, less that at frequency 0


def spectra(
    network: Network, images: Float[Tensor, "N 3 H W"], *, batch_size: int = 64, most: int = MOST
) -> tuple[Spectrum, ...]:
    """The variance and the spectrum of the features over the image, site by site.

    It costs one forward pass an image; some 100 images are plenty. Sites without a diagonal, of one
    row or column of cells, are left out.

    Args:
        network: Any.
        images: In [0, 1], on its device.
        batch_size: Images at once; another size changes nothing but the rounding.
        most: Sites, as `distill.diagnostics.tapped.chosen` takes them.

    Returns:
        In the order they are computed, on the CPU in float64.

    Raises:
        UndefinedError: If no site has a diagonal.
    """
    copied, sites = opened(network, images, most=most)
    sites = tuple(site for site in sites if min(site.grid) > 1)
    if not sites:
        raise UndefinedError("it has no grid of more than one row and column of cells")
    found: dict[Site, list[tuple[Tensor, Tensor]]] = {site: [] for site in sites}
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for batch in torch.split(images, batch_size):
            features = copied(batch).features
            for site in sites:
                grid = features[site.name]
                found[site].append((variance(grid), amplitude(grid)))
    curves = []
    for site, parts in found.items():
        variances, amplitudes = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        curves.append(Spectrum(site, variances, frequencies(site.grid), amplitudes))
    return tuple(curves)


def variance(features: Float[Tensor, "B C h w"]) -> Float[Tensor, " B"]:
    """The unbiased variance over the cells of a grid, mean over channels, in float64."""
    mean: Tensor = features.double().var(dim=(2, 3)).mean(dim=1)
    return mean


def amplitude(features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B F"]:
    """Log amplitudes along half of the diagonal of the 2-D Fourier transform, in float64.

    log(|F(ω, ω)| + 1e-6), mean over channels, less that at ω = 0, at the `frequencies` ω. Of white
    noise it is 0 at ω = 0 and π, whose coefficients are real, and ½ ln 2 between, where they are
    complex and so less often small. The published code stops short of π.
    """
    height, width = features.shape[-2:]
    steps = min(height, width)
    k = torch.arange(steps // 2 + 1, device=features.device)
    rows, columns = ((k * n / steps).round().long() for n in (height, width))
    coefficients = torch.fft.fft2(features.double())[..., rows, columns]
    logs = (coefficients.abs() + _FLOOR).log().mean(dim=1)
    relative: Tensor = logs - logs[:, :1]
    return relative


def frequencies(grid: tuple[int, int]) -> Float[Tensor, " F"]:
    """The frequencies along the diagonal of a grid, in units of π: 2k / n, n its shorter side.

    The last is 1 where n is even, and (n − 1) / n where it is odd. Where sides differ, the longer
    one's are the nearest that it has.
    """
    steps = min(grid)
    return 2 * torch.arange(steps // 2 + 1, dtype=torch.float64) / steps
