"""Where in one network the features are those of another: centred kernel alignment.

Kornblith, Norouzi, Lee, Hinton: Similarity of Neural Network Representations Revisited, 2019,
arXiv:1905.00414; debiased, and from one batch after the other: Nguyen, Raghu, Kornblith: Do Wide
and Deep Networks Learn the Same Things?, 2021, arXiv:2010.15327.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from distill.diagnostics import UndefinedError
from distill.diagnostics.tapped import MOST, opened
from distill.models.network import Network
from distill.models.taps import POOLED
from distill.types import Site

BATCH = 256  # images that are usually compared with each other
FEWEST = 4  # images of which the estimate is defined
_COLUMNS = 2**16  # features of an image that are held in float64 at once
_TOO_FEW = f"there are fewer than {FEWEST} images to compare"


class Similarity(NamedTuple):
    """Linear CKA of two networks: at most 1, where the one's features are the other's, turned.

    It is about 0 where they have nothing in common, and may be slightly below by chance. It is NaN
    where a site says the same of all images.
    """

    teacher_sites: tuple[Site, ...]  # the R rows
    student_sites: tuple[Site, ...]  # the S columns
    matrix: Float[Tensor, "R S"]  # of the features' means over the grid
    grids: Float[Tensor, "R S"]  # of all features of all cells, each in its place
    pooled: float | None  # of what the classifiers read; None: one of the two has none


def cka(
    teacher: Network,
    student: Network,
    batches: Iterable[Float[Tensor, "B 3 H W"]],
    *,
    most: int = MOST,
) -> Similarity:
    """Debiased linear CKA of every pair of sites, as `linear_cka` defines it.

    It costs one forward pass of each network an image; 512 images are plenty. Sites of different
    grids are compared like any others. The features of one batch of one network are held at once,
    and an images x images matrix a site.

    Args:
        teacher: On the device of the images.
        student: Likewise.
        batches: Images in [0, 1], usually 256 at once, all of one size. Images are compared within
            their batch, so that another size gives another estimate of the same number; batches
            of fewer than 4 images, such as what is left over at the end, are left out.
        most: Sites of each network, as `distill.diagnostics.tapped.chosen` takes them.

    Raises:
        UndefinedError: If there is no batch of 4 images.
    """
    images = iter(batches)
    first = next(images, None)
    if first is None:
        raise UndefinedError(_TOO_FEW)
    ours, rows = opened(teacher, first, most=most)
    theirs, columns = opened(student, first, most=most)

    def compared() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in itertools.chain([first], images):
            if len(batch) >= FEWEST:
                yield _grams(ours, rows, batch), _grams(theirs, columns, batch)

    found = linear_cka(compared()).cpu()
    r, s = len(rows), len(columns)
    pooled = found[2 * r :, 2 * s :]
    return Similarity(
        teacher_sites=rows,
        student_sites=columns,
        matrix=found[:r, :s],
        grids=found[r : 2 * r, s : 2 * s],
        pooled=float(pooled) if pooled.numel() else None,
    )


def linear_cka(
    grams: Iterable[tuple[Float[Tensor, "R n n"], Float[Tensor, "S n n"]]],
) -> Float[Tensor, "R S"]:
    """CKA of R representations with S others.

    Σ HSIC₁(K, L) / √(Σ HSIC₁(K, K) · Σ HSIC₁(L, L)), summed over batches, where

    HSIC₁(K, L) = [tr K̃L̃ + 1ᵀK̃1 · 1ᵀL̃1 / ((n−1)(n−2)) − 2 / (n−2) · 1ᵀK̃L̃1] / (n (n−3)),

    K̃ and L̃ are XXᵀ and YYᵀ with zeros on their diagonals, and n is the number of images in the
    batch. It is the mean of Aᵢⱼ Bᵢⱼ over n (n−3), A and B as `gram` gives them (Székely, Rizzo:
    Partial Distance Correlation with Methods for Dissimilarities, 2014, arXiv:1310.2926). No HSIC
    depends on n in expectation; a batch counts by its images, so that a short one adds no noise.

    Args:
        grams: Of each batch, with n >= 4: what `gram` gives of each representation.

    Raises:
        UndefinedError: If there is none.
    """
    parts = []
    for ours, theirs in grams:
        root = (ours.shape[-1] - 3) ** 0.5
        a, b = ours.flatten(1) / root, theirs.flatten(1) / root
        parts.append((a @ b.T, a.square().sum(dim=1), b.square().sum(dim=1)))
    if not parts:
        raise UndefinedError(_TOO_FEW)
    cross, left, right = (torch.stack(column).sum(dim=0) for column in zip(*parts, strict=True))
    return cross / (left[:, None] * right).sqrt()


def gram(features: Float[Tensor, "n ..."]) -> Float[Tensor, "n n"]:
    """How alike each image is to each other in their features, centred without bias, in float64.

    Kᵢⱼ − Σₗ Kᵢₗ / (n−2) − Σₗ Kₗⱼ / (n−2) + Σₖₗ Kₖₗ / ((n−1)(n−2)), and 0 where i = j, of K = XXᵀ
    with zeros on its diagonal. Rows and columns of it sum to 0.

    Args:
        features: Of n >= 4 images.
    """
    n = len(features)
    alike = torch.zeros(n, n, dtype=torch.float64, device=features.device)
    for part in torch.split(features.flatten(1), _COLUMNS, dim=1):
        exact = part.double()
        exact = exact - exact.mean(dim=0)  # changes nothing but the rounding
        alike += exact @ exact.T
    alike.fill_diagonal_(0)
    row = alike.sum(dim=1) / (n - 2)
    alike -= row[:, None] + row - row.sum() / (n - 1)
    return alike.fill_diagonal_(0)


def _grams(
    network: Network, sites: tuple[Site, ...], images: Float[Tensor, "B 3 H W"]
) -> Float[Tensor, "R n n"]:
    """Of the means at each site, then of the grids, then of what the classifier reads."""
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        features = network(images).features
        grids = [features[site.name] for site in sites]
        means = [grid.mean(dim=(2, 3), dtype=torch.float64) for grid in grids]
        vectors = [features[POOLED]] if POOLED in features else []
        return torch.stack([gram(x) for x in (*means, *grids, *vectors)])
