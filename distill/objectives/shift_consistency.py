"""A student that answers alike when the image moves by some pixels: a soft bias of convolutions.

The penalty is the finite difference of the Lie derivative along translations of Gruver, Finzi,
Goldblum, Wilson: The Lie Derivative for Measuring Learned Equivariance, ICLR 2023,
arXiv:2210.02984.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from distill.component import Count
from distill.objectives._draws import uniform
from distill.objectives._term import Term
from distill.types import Batch, Outputs


def shift_consistency_loss(
    still: Float[Tensor, "B K"], moved: Float[Tensor, "B K"], *, pixels: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Σ_k (p_k − q_k)² over the squared length of the move, p and q the classes' probabilities.

    Args:
        still: Logits of the images.
        moved: Logits of the same images, moved.
        pixels: How far, > 0.

    Returns:
        One value a sample.
    """
    difference = F.softmax(still.float(), dim=-1) - F.softmax(moved.float(), dim=-1)
    return difference.square().sum(dim=-1) / pixels.square()


def moved(
    images: Float[Tensor, "B 3 H W"], down: Int[Tensor, " B"], right: Int[Tensor, " B"]
) -> Float[Tensor, "B 3 H W"]:
    """The images moved by whole pixels, each by its own, mirrored at the border."""
    for axis, by in ((2, down), (3, right)):
        size = images.shape[axis]
        place = (torch.arange(size, device=images.device) - by[:, None]).abs()
        place = size - 1 - (size - 1 - place).abs()
        shape = [len(images), 1, 1, 1]
        shape[axis] = size
        images = torch.take_along_dim(images, place.view(shape), dim=axis)
    return images


class ShiftConsistency(Term):
    """Answer alike when the image moves; a second forward pass of the student, weight 1 to 100."""

    steps: Tensor
    needs_teacher = False
    shows = True

    def __init__(self, *, pixels: Count = 1) -> None:
        super().__init__()
        # Down, along the eight neighbours of a cell, clockwise; on the device before any step.
        steps = torch.tensor([0, 1, 1, 1, 0, -1, -1, -1]) * pixels
        self.register_buffer("steps", steps, persistent=False)

    def show(self, batch: Batch) -> Tensor:
        """The batch's images, each moved to one of eight sides."""
        return moved(batch.images, *self._moves(batch))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert student.again is not None
        down, right = self._moves(batch)
        length = (down.square() + right.square()).float().sqrt()
        return shift_consistency_loss(student.logits, student.again.logits, pixels=length)

    def _moves(self, batch: Batch) -> tuple[Tensor, Tensor]:
        side = (uniform(batch, 1, salt=1)[:, 0] * 8).long()  # a function of sample and view
        return self.steps[side], self.steps[(side + 2) % 8]
