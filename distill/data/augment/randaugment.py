"""A few random operations of a fixed strength.

Cubuk, Zoph, Shlens, Le: RandAugment: Practical Automated Data Augmentation with a Reduced Search
Space, NeurIPS 2020, arXiv:1909.13719.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from distill.component import Count
from distill.data.augment import _ops, _policy
from distill.data.augment._augmentation import Augmentation, Plan
from distill.errors import RecipeError


class RandAugment(Augmentation):
    """Apply `num_ops` operations, each one of 14, of a strength between 0 and 30."""

    def __init__(self, *, num_ops: Count = 2, magnitude: Count = 9) -> None:
        if magnitude >= _policy.BINS:
            raise RecipeError(f"magnitude is {magnitude}, and the greatest is {_policy.BINS - 1}")
        self.num_draws = 2 * num_ops
        self._magnitude = magnitude

    def plan(
        self, uniforms: Float[ndarray, "n D"], *, height: int, width: int
    ) -> dict[str, ndarray]:
        """The operation of every round, and its arguments."""
        limits = _policy.Limits(
            shear=0.3,
            # 150 pixels of AutoAugment's images, which have 331.
            translate_x=width * 150 / 331,
            translate_y=height * 150 / 331,
            rotate=30,
            enhance=0.9,
            posterize=4,
        )
        rounds = [
            _policy.plan(
                _policy.choose(draws[:, 0], len(_policy.NAMES)),
                self._magnitude,
                np.where(draws[:, 1] < 0.5, -1, 1),
                limits=limits,
                height=height,
                width=width,
            )
            for draws in np.split(uniforms, self.num_draws // 2, axis=1)
        ]
        return {
            name: np.concatenate([drawn[name] for drawn in rounds], axis=1) for name in rounds[0]
        }

    def apply(self, images: UInt8[Tensor, "B 3 H W"], plan: Plan) -> UInt8[Tensor, "B 3 H W"]:
        """The images after their operations."""
        return _ops.apply(images, plan)
