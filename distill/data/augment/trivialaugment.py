"""One random operation of random strength.

Müller, Hutter: TrivialAugment: Tuning-Free Yet State-of-the-Art Data Augmentation, ICCV 2021,
arXiv:2103.10158. This is its wide space of strengths.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from distill.data.augment import _ops, _policy
from distill.data.augment._augmentation import Augmentation, Plan

_LIMITS = _policy.Limits(
    shear=0.99, translate_x=32, translate_y=32, rotate=135, enhance=0.99, posterize=6
)


class TrivialAugment(Augmentation):
    """Apply one operation of 14, of a strength drawn anew for every image; nothing to tune."""

    num_draws = 3

    def plan(
        self, uniforms: Float[ndarray, "n 3"], *, height: int, width: int
    ) -> dict[str, ndarray]:
        """The operation and its arguments."""
        return _policy.plan(
            _policy.choose(uniforms[:, 0], len(_policy.NAMES)),
            _policy.choose(uniforms[:, 1], _policy.BINS),
            np.where(uniforms[:, 2] < 0.5, -1, 1),
            limits=_LIMITS,
            height=height,
            width=width,
        )

    def apply(self, images: UInt8[Tensor, "B 3 H W"], plan: Plan) -> UInt8[Tensor, "B 3 H W"]:
        """The images after their operation."""
        return _ops.apply(images, plan)
