"""Decoupled distillation: how sure of the label, and how the other classes compare, by themselves.

Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022, arXiv:2203.08679.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from distill.component import NonNegative, Positive
from distill.objectives._term import Term
from distill.types import Batch, Outputs


def dkd_loss(
    student: Float[Tensor, "B K"],
    teacher: Float[Tensor, "B K"],
    target: Int[Tensor, " B"],
    *,
    temperature: float,
    alpha: float,
    beta: float,
) -> Float[Tensor, " B"]:
    """T² (α KL(b_t ‖ b_s) + β KL(p̂_t ‖ p̂_s)): the label against the rest, and within the rest.

    b = (p_y, 1 − p_y) and p̂ is the softmax over the other classes alone, both at T. With α = 1 and
    β = 1 − p_t,y this is plain distillation, which forgets the second part just where the teacher
    is sure.

    Args:
        student: Student logits.
        teacher: Teacher logits over the same classes. They get no gradient.
        target: Class y of every sample.
        temperature: T > 0.
        alpha: Weight of the first part.
        beta: Weight of the second.

    Returns:
        One value a sample, in nats times T².
    """
    own, other = student.float() / temperature, teacher.detach().float() / temperature
    binary = divergence(label_and_rest(other, target), label_and_rest(own, target))
    rest = divergence(without(other, target).log_softmax(-1), without(own, target).log_softmax(-1))
    return temperature**2 * (alpha * binary + beta * rest)


def label_and_rest(z: Float[Tensor, "B K"], target: Int[Tensor, " B"]) -> Float[Tensor, "B 2"]:
    """The logarithms of the label's probability and of that of all others together."""
    label = z.gather(1, target[:, None])
    rest = without(z, target).logsumexp(dim=1, keepdim=True)
    return F.log_softmax(torch.cat([label, rest], dim=1), dim=1)


def without(z: Float[Tensor, "B K"], target: Int[Tensor, " B"]) -> Float[Tensor, "B K-1"]:
    """The logits of all classes but the label's.

    Gathered by computed places: a large negative number in the label's place is no infinity, and
    logits may be larger.
    """
    places = torch.arange(z.shape[1] - 1, device=z.device)
    return z.gather(1, places + (places >= target[:, None]))


def divergence(log_p: Float[Tensor, "B K"], log_q: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """KL(p ‖ q) = Σ_k p_k (log p_k − log q_k) of two distributions, as logarithms."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


class DKD(Term):
    """Match the label against the rest, and the rest among itself; ramp its weight up first."""

    needs_labels = True

    def __init__(
        self,
        *,
        alpha: NonNegative = 1.0,
        beta: NonNegative = 8.0,
        temperature: Positive = 4.0,
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return dkd_loss(
            student.logits,
            teacher.softened(self.temperature),
            batch.labels.argmax(dim=1),  # of mixed labels the larger
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
        )
