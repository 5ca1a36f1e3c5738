"""A teacher transformed, a student left as it is: no temperature on the student's side.

Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024,
arXiv:2402.11148.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.component import Fraction
from distill.objectives._term import Term
from distill.objectives.dkd import divergence
from distill.types import Batch, Outputs


def ttm_loss(
    student: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], *, gamma: float
) -> Float[Tensor, " B"]:
    """KL(q ‖ p_s) with q_k = p_t,k^γ / Σ p_t^γ, which is the softmax of γ times the logits.

    γ is 1 / T; with the student at T = 1 the loss is that of KD and a penalty of a student that is
    too sure (the Rényi entropy of its probabilities). There is no T².

    Args:
        student: Student logits.
        teacher: Teacher logits over the same classes. They get no gradient.
        gamma: Power of the teacher's probabilities, in (0, 1].

    Returns:
        One value a sample, in nats.
    """
    log_q = F.log_softmax(gamma * teacher.detach().float(), dim=1)
    return divergence(log_q, F.log_softmax(student.float(), dim=1))


class TTM(Term):
    """Match the teacher's softened classes with a student that is not softened."""

    def __init__(self, *, gamma: Fraction = 0.1) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return ttm_loss(student.logits, teacher.logits, gamma=self.gamma)
