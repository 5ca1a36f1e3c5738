"""Relations of two and of three images: their distances and their angles.

Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.component import Count, NonNegative
from distill.objectives._draws import uniform
from distill.objectives._gather import whole
from distill.objectives._term import Reads, Term
from distill.types import Batch, Outputs

LEAST = 1e-12  # of a squared length: its root has no slope at 0


def distance_loss(
    student: Float[Tensor, "B D"], teacher: Float[Tensor, "B E"]
) -> Float[Tensor, ""]:
    """Smooth L1 between the distances of all pairs, each side's over their mean.

    Args:
        student: Features of the student.
        teacher: Features of the teacher for the same images. They get no gradient.

    Returns:
        The mean over all B² pairs, as in the paper's code.
    """
    own, other = (_distances(x) for x in (student, teacher.detach()))
    return F.smooth_l1_loss(own, other)


def angle_loss(student: Float[Tensor, "B D"], teacher: Float[Tensor, "B E"]) -> Float[Tensor, ""]:
    """Smooth L1 between the cosines of the angles that any two images make at a third.

    Args:
        student: Features of the student.
        teacher: Features of the teacher for the same images. They get no gradient.

    Returns:
        The mean over all B³ triples. It takes memory for so many.
    """
    own, other = (_angles(x) for x in (student, teacher.detach()))
    return F.smooth_l1_loss(own, other)


def _distances(x: Float[Tensor, "B D"]) -> Float[Tensor, "B B"]:
    # By products, in B² memory; what all images share would leave them few digits.
    x = x.float() - x.float().mean(dim=0)
    squares = x.square().sum(dim=1)
    apart = (squares[:, None] + squares - 2 * x @ x.T).clamp_min(LEAST).sqrt()
    count = len(x)
    off = ~torch.eye(count, dtype=torch.bool, device=x.device)
    apart = torch.where(off, apart, 0.0)
    return apart / (apart.sum() / max(count * (count - 1), 1)).clamp_min(1e-6)


def _angles(x: Float[Tensor, "B D"]) -> Float[Tensor, "B B B"]:
    differences = x.float()[None] - x.float()[:, None]
    length = (differences.square().sum(dim=-1, keepdim=True) + LEAST).sqrt()
    units = differences / length
    return units @ units.transpose(1, 2)


class RKD(Term):
    """Match distances and angles between images; a usual weight is 1, with these two inside."""

    reads_classes = False
    needs_batch = True
    reads = Reads(("pooled",), ("pooled",))

    def __init__(
        self, *, distance: NonNegative = 25.0, angle: NonNegative = 50.0, anchors: Count = 128
    ) -> None:
        super().__init__()
        self.distance, self.angle, self.anchors = distance, angle, anchors

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """A scalar over the whole batch; angles of `anchors` of its images.

        All B³ angles of 512 images would take half a gigabyte. Lots are drawn for the images, in
        every view anew: those with the least ids would often be of the first classes alone.
        """
        assert teacher is not None
        with torch.autocast(student.logits.device.type, enabled=False):
            own, other = (whole(side.read("pooled")) for side in (student, teacher))
            loss = self.distance * distance_loss(own, other)
            chosen = whole(uniform(batch, 1, salt=5)[:, 0]).argsort()[: self.anchors]
            return loss + self.angle * angle_loss(own[chosen], other[chosen])
