"""Hard-label distillation.

Touvron, Cord, Douze, Massa, Sablayrolles, Jégou: Training data-efficient image transformers &
distillation through attention, ICML 2021, arXiv:2012.12877 (section 4, hard-label distillation).
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.objectives._term import Term
from distill.types import Batch, Outputs


def hard_loss(student: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Cross-entropy with the class that the teacher ranks first: −log q_c, c = argmax_k teacher_k.

    It has no temperature, and so no T².

    Args:
        student: Student logits.
        teacher: Teacher logits over the same classes. They get no gradient.

    Returns:
        One value a sample, in nats.
    """
    return F.cross_entropy(student.float(), teacher.argmax(dim=-1), reduction="none")


class Hard(Term):
    """Match the class that the teacher ranks first."""

    @property
    def needs_tail(self) -> bool:
        """It reads the first class alone."""
        return False

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return hard_loss(student.logits, teacher.logits)
