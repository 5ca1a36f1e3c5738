"""Which images are alike, by the angle between them: the plain relation loss of tutorials.

The similarity matrix is that of Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV
2019, arXiv:1907.09682, with cosines in place of scaled rows, as in Park, Kim, Lu, Cho: Relational
Knowledge Distillation, CVPR 2019, arXiv:1904.05068.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.objectives._gather import first_row, whole
from distill.objectives._term import Reads, Term
from distill.types import Batch, Outputs


def relations_loss(
    student: Float[Tensor, "B ..."], teacher: Float[Tensor, "B ..."]
) -> Float[Tensor, " B"]:
    """Mean squared difference of an image's cosines with the others: Σ_j≠i (S − T)² / (B − 1).

    An image's cosine with itself is 1 on both sides and is left out: the mean over all B² would be
    smaller by what is always zero.

    Args:
        student: Features of the student.
        teacher: Features of the teacher for the same images. They get no gradient.

    Returns:
        One value a sample. It depends on the whole batch, gathered over all processes; 0 where
        there is one image.
    """
    with torch.autocast(student.device.type, enabled=False):  # it would multiply in half precision
        own, other = (
            unit @ whole(unit).T
            for unit in (
                F.normalize(x.float().flatten(1), dim=1) for x in (student, teacher.detach())
            )
        )
    rows = torch.arange(len(own), device=own.device)[:, None] + first_row(own)
    others = rows != torch.arange(own.shape[1], device=own.device)
    difference = torch.where(others, own - other, 0.0)
    return difference.square().sum(dim=1) / max(own.shape[1] - 1, 1)


class Relations(Term):
    """Match the angles between images, as the teacher's classifier sees them; weight 1 to 10."""

    reads_classes = False
    needs_batch = True
    reads = Reads(("pooled",), ("pooled",))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return relations_loss(student.read("pooled"), teacher.read("pooled"))
