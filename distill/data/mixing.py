"""Mixing pairs of images and their labels.

Mixup: Zhang, Cisse, Dauphin, Lopez-Paz: mixup: Beyond Empirical Risk Minimization, ICLR 2018,
arXiv:1710.09412.
CutMix: Yun, Han, Oh, Chun, Choe, Yoo: CutMix: Regularization Strategy to Train Strong Classifiers
with Localizable Features, ICCV 2019, arXiv:1905.04899.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from distill.data.augment import _boxes as boxes

NUM_DRAWS = 5


def plan(
    uniforms: Float[ndarray, "P 5"], *, mixup: float, cutmix: float, height: int, width: int
) -> dict[str, ndarray]:
    """How each pair of images is mixed; where both kinds are on, each has half of the pairs.

    The share of an image in itself is λ ~ Beta(α, α). A cutmix box has 1 − λ of the image's area
    and its centre anywhere; it is clipped at the border, and λ is then the share left outside.

    Args:
        uniforms: Numbers in [0, 1), `NUM_DRAWS` a pair.
        mixup: α of mixup; 0 is off.
        cutmix: α of cutmix; 0 is off. One of the two is on.
        height: Rows of the images.
        width: Columns of the images.

    Returns:
        `share`, λ of the labels as float32 (P,). Where mixup is on, `weight`, λ of the pixels as
        float32 (P,): 1 for a pair that cutmix has. Where cutmix is on, `box` as int16 (P, 4):
        first row, last row + 1, first column, last column + 1, all 0 for a pair that mixup has.
    """
    choice, u, v, row, column = uniforms.T
    if not cutmix:
        share = beta(u, v, alpha=mixup).astype(np.float32)
        return {"share": share, "weight": share}
    cut = choice < 0.5 if mixup else np.ones(len(choice), dtype=bool)
    half = 0.5 * np.sqrt(1 - beta(u, v, alpha=cutmix))
    edges = []
    for place, size in ((row, height), (column, width)):
        centre, reach = np.floor(place * size), np.floor(half * size)
        edges += [np.maximum(centre - reach, 0), np.minimum(centre + reach, size)]
    box = np.where(cut, np.stack(edges), 0).T
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    drawn = {"share": 1 - area / (height * width), "box": box.astype(np.int16)}
    if mixup:
        drawn["weight"] = np.where(cut, 1, beta(u, v, alpha=mixup)).astype(np.float32)
        drawn["share"] = np.where(cut, drawn["share"], drawn["weight"])
    return drawn | {"share": drawn["share"].astype(np.float32)}


def cut(images: UInt8[Tensor, "B 3 H W"], box: Int[Tensor, "P 4"]) -> UInt8[Tensor, "B 3 H W"]:
    """Images with the inside of their pair's box from the neighbour; rows 2j and 2j+1 are a pair.

    Args:
        images: Images, fastest in channels_last memory.
        box: First row, last row + 1, first column, last column + 1.
    """
    _, channels, height, width = images.shape
    pairs = images.permute(0, 2, 3, 1).reshape(-1, 2, height, width * channels)
    inside = boxes.mask(box, height=height, width=width, channels=channels)
    swapped = (pairs[:, 0] ^ pairs[:, 1]) & inside
    mixed = pairs ^ swapped[:, None]
    return mixed.view(-1, height, width, channels).permute(0, 3, 1, 2)


def blend(values: Float[Tensor, "B ..."], share: Float[Tensor, " P"]) -> Float[Tensor, "B ..."]:
    """λ x_i + (1 − λ) x_partner for images and for labels; rows 2j and 2j+1 are a pair.

    Args:
        values: One row a sample.
        share: λ of every pair.
    """
    pairs = values.reshape(-1, 2, *values.shape[1:])
    rest = (1 - share).reshape(-1, *[1] * (values.ndim - 1))
    moved = (pairs[:, 1] - pairs[:, 0]) * rest
    mixed = torch.empty_like(pairs)
    torch.add(pairs[:, 0], moved, out=mixed[:, 0])
    torch.sub(pairs[:, 1], moved, out=mixed[:, 1])
    return mixed.flatten(0, 1)


def beta(u: Float[ndarray, " n"], v: Float[ndarray, " n"], *, alpha: float) -> Float[ndarray, " n"]:
    """Beta(α, α) from two uniform numbers, exactly and for any α > 0.

    (1 + r / √(1 + r²)) / 2 with r² = (u^(−1/α) − 1) cos²(2πv) and the sign of the cosine, for then
    √(2α) r has Student's t distribution with 2α degrees of freedom (Bailey: Polar Generation of
    Random Variates with the t-Distribution, 1994). Written in w = u^(1/α) and in the distance to
    the nearer end of [0, 1], nothing overflows or cancels for a small α.

    Args:
        u: Numbers in [0, 1).
        v: Numbers in [0, 1).
        alpha: α > 0.

    Returns:
        Numbers in [0, 1].
    """
    w = u ** (1 / alpha)
    cosine = np.cos(2 * np.pi * v)
    spread = (1 - w) * cosine**2
    to_end = w / (w + spread) / (1 + np.sqrt(spread / (w + spread))) / 2
    drawn: ndarray = np.where(cosine < 0, to_end, 1 - to_end)
    return drawn
