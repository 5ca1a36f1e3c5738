"""Normalised distillation: the teacher's probability of the label, and the others among themselves.

Yang, Zeng, Li, Zhang, Yuan, Li: From Knowledge Distillation to Self-Knowledge Distillation: A
Unified Approach with Normalized Loss and Customized Soft Labels, ICCV 2023, arXiv:2303.13005.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from distill.component import NonNegative, Positive
from distill.objectives._term import Term
from distill.objectives.dkd import without
from distill.types import Batch, Outputs


def nkd_loss(
    student: Float[Tensor, "B K"],
    teacher: Float[Tensor, "B K"],
    target: Int[Tensor, " B"],
    *,
    temperature: float,
    gamma: float,
    softened: Float[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    """−t_y log s_y − γ T² Σ_{k≠y} t̂_k log ŝ_k.

    t and s are the classes' probabilities at T = 1, t̂ and ŝ those of all classes but the label at
    T, which sum to 1 on either side and so can agree.

    Args:
        student: Student logits.
        teacher: Teacher logits over the same classes. They get no gradient.
        target: Class y of every sample.
        temperature: T > 0 of the second part.
        gamma: Weight of the second part.
        softened: Logits that speak for the teacher at T, where they are others, as an ensemble's.

    Returns:
        One value a sample, in nats.
    """
    own, label = student.float(), target[:, None]
    sure = teacher.detach().float().softmax(dim=1).gather(1, label)
    first = -(sure * F.log_softmax(own, dim=1).gather(1, label))[:, 0]
    log_s = F.log_softmax(without(own, target) / temperature, dim=1)
    other = (teacher if softened is None else softened).detach().float()
    t = F.softmax(without(other, target) / temperature, dim=1)
    return first - gamma * temperature**2 * (t * log_s).sum(dim=1)


class NKD(Term):
    """Match the label as surely as the teacher, and the rest among itself; a usual weight is 1."""

    needs_labels = True

    def __init__(self, *, gamma: NonNegative = 1.5, temperature: Positive = 1.0) -> None:
        super().__init__()
        self.gamma, self.temperature = gamma, temperature

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return nkd_loss(
            student.logits,
            teacher.logits,
            batch.labels.argmax(dim=1),  # of mixed labels the larger
            temperature=self.temperature,
            gamma=self.gamma,
            softened=teacher.softened(self.temperature),
        )
