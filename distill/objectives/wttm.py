"""Transformed teacher matching that hears most where the teacher hesitates.

Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024,
arXiv:2402.11148 (section 4).
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.component import Fraction
from distill.objectives._term import Term
from distill.objectives.ttm import ttm_loss
from distill.types import Batch, Outputs


def wttm_loss(
    student: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], *, gamma: float
) -> Float[Tensor, " B"]:
    """Each sample's TTM times U = Σ_k p_t,k^γ: 1 where the teacher is certain, K^(1 − γ) where not.

    Args:
        student: Student logits.
        teacher: Teacher logits over the same classes. They get no gradient.
        gamma: Power of the teacher's probabilities, in (0, 1].

    Returns:
        One value a sample, in nats.
    """
    log_p = F.log_softmax(teacher.detach().float(), dim=1)
    spread = (gamma * log_p).logsumexp(dim=1).exp()
    return spread * ttm_loss(student, teacher, gamma=gamma)


class WTTM(Term):
    """Match the teacher's softened classes, most where it hesitates, student not softened."""

    def __init__(self, *, gamma: Fraction = 0.1) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return wttm_loss(student.logits, teacher.logits, gamma=self.gamma)
