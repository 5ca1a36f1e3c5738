"""Random brightness, contrast, saturation and hue."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from distill.component import Fraction, NonNegative
from distill.data.augment import _ops
from distill.data.augment._augmentation import Augmentation, Plan


class ColorJitter(Augmentation):
    """Scale brightness, contrast and saturation by 1 ± a spread and turn the hue, in any order."""

    num_draws = 8

    def __init__(
        self,
        *,
        brightness: NonNegative = 0.4,
        contrast: NonNegative = 0.4,
        saturation: NonNegative = 0.4,
        hue: Fraction = 0.0,
    ) -> None:
        spreads = (brightness, contrast, saturation, hue)
        operations = (_ops.brightness, _ops.contrast, _ops.saturation, _ops.hue)
        self._numbers = np.array(
            [
                _ops.OPERATIONS.index(operation if spread else _ops.identity)
                for operation, spread in zip(operations, spreads, strict=True)
            ]
        )
        self._low = np.array([*(max(0, 1 - spread) for spread in spreads[:3]), -hue])
        self._high = np.array([*(1 + spread for spread in spreads[:3]), hue])

    def plan(
        self, uniforms: Float[ndarray, "n 8"], *, height: int, width: int
    ) -> dict[str, ndarray]:
        """The operations in their order, and their arguments."""
        values = self._low + (self._high - self._low) * uniforms[:, :4]
        order = uniforms[:, 4:].argsort(axis=1)
        return {
            "operation": self._numbers[order],
            "arguments": np.take_along_axis(values, order, axis=1)[..., None],
        }

    def apply(self, images: UInt8[Tensor, "B 3 H W"], plan: Plan) -> UInt8[Tensor, "B 3 H W"]:
        """The images after the four operations."""
        return _ops.apply(images, plan)
