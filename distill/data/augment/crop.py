"""Shift an image a few pixels."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from distill.component import Count
from distill.data.augment._augmentation import Augmentation, Plan
from distill.data.augment._canvas import Canvas


class Crop(Augmentation):
    """Pad with zeros and cut out a window of the image's own size; 1/8 of the size by default."""

    num_draws = 2

    def __init__(self, *, padding: Count | None = None) -> None:
        self._padding = padding

    def padding(self, size: int) -> int:
        """Border in pixels for images of `size` pixels; 4 at 32, as is usual for CIFAR."""
        return size // 8 if self._padding is None else self._padding

    def plan(
        self, uniforms: Float[ndarray, "n 2"], *, height: int, width: int
    ) -> dict[str, ndarray]:
        """The window's first row and column, counted from those of the border."""
        places = 2 * self.padding(max(height, width)) + 1
        corner = np.floor(uniforms * places).astype(np.int64)
        return {"top": corner[:, 0], "left": corner[:, 1]}

    def apply(self, images: UInt8[Tensor, "B 3 H W"], plan: Plan) -> UInt8[Tensor, "B 3 H W"]:
        """The windows."""
        padding = self.padding(max(images.shape[-2:]))
        canvas = Canvas(images.permute(0, 2, 3, 1), padding=padding)
        number = torch.arange(len(images), device=images.device)
        return canvas.windows(canvas.offsets(number, plan.device["top"], plan.device["left"]))
