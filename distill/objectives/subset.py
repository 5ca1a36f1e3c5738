"""A student that tells from a quarter of the patches what it would tell from all of them.

The idea is that of Kim, Chun, Heo, Han: Learning with Unmasked Tokens Drives Stronger Vision
Learners, ECCV 2024, arXiv:2310.13593; the loss is that of Grill et al.: BYOL, NeurIPS 2020,
arXiv:2006.07733. Hidden patches are gray, so that it works for any network.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Count, Fraction
from distill.errors import IncompatibleError
from distill.objectives._draws import uniform
from distill.objectives._term import Reads, Term
from distill.types import Batch, Outputs, Pair

GRAY = 0.5


def subset_loss(part: Float[Tensor, "B D"], whole: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """2 − 2 cosine of what was told from a part of the image and from all of it.

    Args:
        part: Predicted from the part.
        whole: Of the whole image. It gets no gradient: both would become constant.

    Returns:
        One value a sample, in [0, 4].
    """
    return 2 - 2 * F.cosine_similarity(part.float(), whole.detach().float(), dim=-1)


class Subset(Term):
    """Tell the whole from some patches; a second forward pass of the student, weight 0.1 to 1."""

    needs_teacher = False
    shows = True
    reads = Reads(("pooled",))

    def __init__(self, *, keep: Fraction = 0.25, patch: Count = 4) -> None:
        super().__init__()
        self.keep, self.patch = keep, patch

    def connect(self, pair: Pair) -> None:
        """Build what predicts the whole from a part."""
        width = pair.student.width
        if not width:
            raise IncompatibleError(f"{pair.student.model} has no classifier to read `pooled` at")
        hidden = [nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU()]
        self.predictor = nn.Sequential(*hidden, nn.Linear(2 * width, width))

    def show(self, batch: Batch) -> Tensor:
        """The batch's images with all but some patches gray."""
        height, width = batch.images.shape[-2:]
        rows, columns = -(-height // self.patch), -(-width // self.patch)
        order = uniform(batch, rows * columns, salt=2).argsort(dim=1).argsort(dim=1)
        seen = (order < max(round(self.keep * rows * columns), 1)).view(-1, 1, rows, columns)
        seen = seen.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        return batch.images.where(seen[:, :, :height, :width], GRAY)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert student.again is not None
        part = self.predictor(student.again.read("pooled"))
        return subset_loss(part, student.read("pooled"))
