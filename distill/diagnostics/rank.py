"""How many directions a network's features use.

Roy, Vetterli: The Effective Rank: A Measure of Effective Dimensionality, 2007.
Yu, Chan, You, Song, Ma: Learning Diverse and Discriminative Representations via the Principle of
Maximal Coding Rate Reduction, 2020, arXiv:2006.08558.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.diagnostics import UndefinedError
from distill.diagnostics.tapped import MOST, opened
from distill.models.network import Network
from distill.models.taps import POOLED
from distill.types import Site

EPSILON = 0.01  # squared distortion of the coding rate: that of the published code
ROWS = 4096  # cells of a site that are looked at, over all images
_SEED = int.from_bytes(b"cells", "big")
_ROUNDING = 1e-12  # of a share of the variance


class Rank(NamedTuple):
    """How many directions N features of D numbers use; of singular values σ when centred."""

    most: int  # min(N − 1, D), which effective rank and components cannot exceed
    effective: float  # exp(−Σ p ln p), p = σ / Σ σ
    participation: float  # (Σ σ²)² / Σ σ⁴
    k90: int  # principal components that hold 90 % of the variance Σ σ²
    k95: int
    k99: int
    coding_rate: float  # ½ ln det(I + D / (N ε) ZᵀZ) in nats, Z the rows at unit length


class Ranks(NamedTuple):
    """The ranks of a network's features from layer to layer."""

    pooled: Rank | None  # of what the classifier reads; None: it has none
    sites: tuple[Site, ...]
    cells: tuple[Rank, ...]  # at each site, of the features of single cells


def ranks(
    network: Network, images: Float[Tensor, "N 3 H W"], *, batch_size: int = 64, most: int = MOST
) -> Ranks:
    """The rank of the vectors that the classifier reads, and of the cells' at every site.

    It costs one forward pass an image. A rank is at most the number of images less one: it only
    says something of the network where that, `Rank.most`, is well above it, and ranks of different
    numbers of images do not compare. Of the cells of a site 4096 are looked at, equally many in
    each image, at places that are drawn once.

    Args:
        network: Any.
        images: In [0, 1], on its device.
        batch_size: Images at once; another size changes nothing but the rounding.
        most: Sites, as `distill.diagnostics.tapped.chosen` takes them.

    Raises:
        UndefinedError: If features are the same everywhere.
    """
    copied, sites = opened(network, images, most=most)
    places = {site: _places(len(images), math.prod(site.grid)) for site in sites}
    rows: dict[str, list[Tensor]] = {}
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for start in range(0, len(images), batch_size):
            features = copied(images[start : start + batch_size]).features
            if POOLED in features:
                rows.setdefault(POOLED, []).append(features[POOLED])
            for site, drawn in places.items():
                grid = features[site.name].flatten(2)
                own = drawn[start : start + batch_size, None].to(grid.device)
                cells = grid.gather(2, own.expand(-1, grid.shape[1], -1))
                rows.setdefault(site.name, []).append(cells.mT.flatten(0, 1))
    found = {name: rank(torch.cat(parts)) for name, parts in rows.items()}
    return Ranks(found.get(POOLED), sites, tuple(found[site.name] for site in sites))


def rank(features: Float[Tensor, "N D"]) -> Rank:
    """The measures of `Rank`, in float64.

    They are the same for features that are turned or multiplied by a number, and, but for the
    coding rate, moved: it codes directions seen from 0. Its ε stands where the paper has ε².

    Raises:
        UndefinedError: If all rows are the same, or one is not finite.
    """
    exact = features.double()
    if not bool(exact.isfinite().all()):
        raise UndefinedError("its features are not finite numbers")
    num, width = exact.shape
    variance = _eigenvalues(exact - exact.mean(dim=0)).flip(0)
    if not bool(variance.any()):
        raise UndefinedError("its features are the same for all images")
    sigma = variance.sqrt()
    share = sigma / sigma.sum()
    held = variance.cumsum(0) / variance.sum()
    unit = exact / exact.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    codes = torch.log1p(width / (num * EPSILON) * _eigenvalues(unit)).sum() / 2
    k90, k95, k99 = (int((held < part - _ROUNDING).sum()) + 1 for part in (0.9, 0.95, 0.99))
    return Rank(
        most=min(num - 1, width),
        effective=math.exp(float(torch.special.entr(share).sum())),
        participation=float(variance.sum() ** 2 / variance.square().sum()),
        k90=k90,
        k95=k95,
        k99=k99,
        coding_rate=float(codes),
    )


def _eigenvalues(rows: Float[Tensor, "N D"]) -> Float[Tensor, " k"]:
    """Of XᵀX, rising; of XXᵀ, which has the same but zeros, where that is smaller.

    What is rounding is 0: its square roots would add up.
    """
    small = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    found = torch.linalg.eigvalsh(small)
    exact: Tensor = found * (found > found[-1] * len(found) * torch.finfo(found.dtype).eps)
    return exact


def _places(images: int, cells: int) -> Int[Tensor, "N k"]:
    """Cells of each image, without repeats, up to so many that all images have `ROWS`."""
    draws = torch.rand(images, cells, generator=torch.Generator().manual_seed(_SEED))
    return draws.argsort(dim=1)[:, : max(1, ROWS // images)]
