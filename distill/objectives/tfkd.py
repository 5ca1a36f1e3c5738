"""Distillation without a teacher: one that is always right, and equally unsure of all the rest.

Yuan, Tay, Li, Wang, Feng: Revisiting Knowledge Distillation via Label Smoothing Regularization,
CVPR 2020, arXiv:1909.11723 (teacher-free, by a manually designed teacher).
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.component import Fraction, Positive
from distill.objectives._term import Term
from distill.objectives.dkd import divergence
from distill.types import Batch, Outputs


def tfkd_loss(
    student: Float[Tensor, "B K"],
    labels: Float[Tensor, "B K"],
    *,
    correct: float,
    temperature: float,
) -> Float[Tensor, " B"]:
    """T² KL(u ‖ p_s), u being the virtual teacher's classes and p_s the student's, both at T.

    The teacher gives the label the probability a and spreads 1 − a evenly over the others; at T its
    classes are the softmax of log p / T. For mixed labels its probabilities are mixed.

    Args:
        student: Student logits.
        labels: Class probabilities: one-hot, or mixed by mixup and cutmix.
        correct: a, in (0, 1).
        temperature: T > 0.

    Returns:
        One value a sample, in nats times T².
    """
    others = (1 - correct) / max(labels.shape[1] - 1, 1)
    virtual = (labels * correct + (1 - labels) * others).clamp_min(1e-12)
    log_u = F.log_softmax(virtual.log() / temperature, dim=1)
    log_s = F.log_softmax(student.float() / temperature, dim=1)
    return temperature**2 * divergence(log_u, log_s)


class TFKD(Term):
    """Match a virtual teacher that is right and smooth; no network teaches."""

    needs_teacher = False
    needs_labels = True

    def __init__(self, *, correct: Fraction = 0.99, temperature: Positive = 20.0) -> None:
        super().__init__()
        self.correct, self.temperature = correct, temperature

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return tfkd_loss(
            student.logits, batch.labels, correct=self.correct, temperature=self.temperature
        )
