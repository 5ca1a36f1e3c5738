"""Photographs, and how much is left of them.

Four of 32 px in `corruptions/published.npz` and one of 224 px, `corruptions/flower.png`: parts of
china.jpg and flower.jpg of scikit-learn (danielbuechele and vultilion, flickr.com, CC BY 2.0), made
smaller.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.data.pixels import to_float

FOLDER = Path(__file__).with_name("corruptions")


def images(pixels: np.ndarray) -> Tensor:
    """Of bytes (B, H, W, C)."""
    return to_float(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).expand(-1, 3, -1, -1))


def photographs(side: int) -> Tensor:
    """All four at 32 px; the large one at any other size."""
    if side == 32:
        return images(np.load(FOLDER / "published.npz", allow_pickle=False)["small_inputs"])
    with Image.open(FOLDER / "flower.png") as flower:
        whole = flower.resize((side, side), Image.Resampling.BICUBIC)
    return images(np.asarray(whole)[None])


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Of every image, in decibels; at most 100."""
    return -10 * (one.double() - other).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()
