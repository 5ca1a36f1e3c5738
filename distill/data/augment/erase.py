"""Hide a part of an image.

Zhong, Zheng, Kang, Li, Yang: Random Erasing Data Augmentation, AAAI 2020, arXiv:1708.04896.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from distill.component import Fraction, Positive
from distill.data.augment import _boxes
from distill.data.augment._augmentation import Augmentation, Plan


class Erase(Augmentation):
    """Fill a box of random area and aspect ratio with the image's own mean colour."""

    student_only = True
    num_draws = 1 + _boxes.NUM_DRAWS

    def __init__(
        self,
        *,
        probability: Fraction = 0.25,
        min_scale: Fraction = 0.02,
        max_scale: Fraction = 0.33,
        min_ratio: Positive = 0.3,
        max_ratio: Positive = 3.3,
    ) -> None:
        self._probability = probability
        self._scale = _boxes.interval(min_scale, max_scale, "scale")
        self._ratio = _boxes.interval(min_ratio, max_ratio, "ratio")

    def plan(
        self, uniforms: Float[ndarray, "n D"], *, height: int, width: int
    ) -> dict[str, ndarray]:
        """The box: first row, last row + 1, first column, last column + 1; all 0 for none."""
        boxes = _boxes.draw(
            uniforms[:, 1:], scale=self._scale, ratio=self._ratio, height=height, width=width
        )
        edges = (boxes.top, boxes.top + boxes.height, boxes.left, boxes.left + boxes.width)
        erased = boxes.found & (uniforms[:, 0] < self._probability)
        return {"box": np.where(erased, np.stack(edges), 0).T.astype(np.int16)}

    def apply(self, images: UInt8[Tensor, "B 3 H W"], plan: Plan) -> UInt8[Tensor, "B 3 H W"]:
        """The images, with their box filled."""
        num, channels, height, width = images.shape
        total = images.sum(dim=(2, 3), dtype=torch.int64)
        mean = (total // (height * width)).to(torch.uint8)
        pixels = images.permute(0, 2, 3, 1).reshape(num, height, width * channels)
        fill = mean.repeat(1, width)[:, None]
        inside = _boxes.mask(plan.device["box"], height=height, width=width, channels=channels)
        erased = pixels ^ ((pixels ^ fill) & inside)
        return erased.view(num, height, width, channels).permute(0, 3, 1, 2)
