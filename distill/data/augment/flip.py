"""Mirror an image."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from distill.component import Fraction
from distill.data.augment._augmentation import Augmentation, Plan


class Flip(Augmentation):
    """Swap left and right in a part of the images."""

    num_draws = 1

    def __init__(self, *, probability: Fraction = 0.5) -> None:
        self.probability = probability

    def plan(
        self, uniforms: Float[ndarray, "n 1"], *, height: int, width: int
    ) -> dict[str, ndarray]:
        """Whether to mirror."""
        return {"flip": uniforms[:, 0] < self.probability}

    def apply(self, images: UInt8[Tensor, "B 3 H W"], plan: Plan) -> UInt8[Tensor, "B 3 H W"]:
        """The images, mirrored where drawn."""
        return torch.where(plan.device["flip"][:, None, None, None], images.flip(-1), images)
