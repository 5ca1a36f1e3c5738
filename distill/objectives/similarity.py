"""Similarity-preserving distillation: images that are alike to the teacher are so to the student.

Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv:1907.09682.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.objectives._gather import whole
from distill.objectives._term import Reads, Term
from distill.types import Batch, Outputs


def similarity_loss(
    student: Float[Tensor, "B ..."], teacher: Float[Tensor, "B ..."]
) -> Float[Tensor, " B"]:
    """Squared difference of the two similarity matrices of a batch: Σ_j (S_ij − T_ij)² / B.

    S and T are F Fᵀ of the flattened features, each row scaled to length 1 (section 3 of the
    paper), so that the two networks may differ in width. The mean over the batch is the paper's
    ‖S − T‖² / B².

    Args:
        student: Features of the student.
        teacher: Features of the teacher for the same images. They get no gradient.

    Returns:
        One value a sample. It depends on the whole batch, gathered over all processes.
    """
    with torch.autocast(student.device.type, enabled=False):  # it would multiply in half precision
        own, other = (
            F.normalize(features @ whole(features).T, dim=-1)
            for features in (student.float().flatten(1), teacher.detach().float().flatten(1))
        )
    return (own - other).square().mean(dim=-1)


class Similarity(Term):
    """Match which images the teacher finds alike; a usual weight is 3000."""

    reads_classes = False
    needs_batch = True
    reads = Reads(("pooled",), ("pooled",))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return similarity_loss(student.read("pooled"), teacher.read("pooled"))
