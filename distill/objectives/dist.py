"""Relations instead of values: the student ranks classes and images as the teacher does.

Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022,
arXiv:2205.10536.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.component import NonNegative, Positive
from distill.objectives._gather import whole
from distill.objectives._term import Term
from distill.types import Batch, Outputs

LEAST = 1e-8  # of a deviation: a constant correlates with nothing


def dist_loss(
    student: Float[Tensor, "B K"],
    teacher: Float[Tensor, "B K"],
    *,
    temperature: float,
    beta: float,
    gamma: float,
) -> Float[Tensor, " B"]:
    """T² (β (1 − ρ over classes) + γ (1 − mean over classes of ρ over images)).

    ρ is Pearson's correlation of the two networks' probabilities at T: of one image over the
    classes, and of one class over the images of the batch.

    Args:
        student: Student logits.
        teacher: Teacher logits over the same classes. They get no gradient.
        temperature: T > 0.
        beta: Weight of the correlation over classes.
        gamma: Weight of the correlation over images, which wants batches of 64 and more.

    Returns:
        One value a sample, at least 0. The second part is that of the whole batch, gathered over
        all processes.
    """
    q = F.softmax(student.float() / temperature, dim=1)
    p = F.softmax(teacher.detach().float() / temperature, dim=1)
    inter = 1 - correlation(q, p, dim=1)
    intra = 1 - correlation(whole(q), whole(p), dim=0).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def correlation(a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    """Pearson's correlation along an axis; 0 where either side is constant."""
    a, b = (x - x.mean(dim=dim, keepdim=True) for x in (a, b))
    lengths = [(x.square().sum(dim=dim) + LEAST**2).sqrt() for x in (a, b)]
    return (a * b).sum(dim=dim) / (lengths[0] * lengths[1]).clamp_min(LEAST)


class DIST(Term):
    """Match how classes and images rank, not how sure they are; a usual weight is 1 or 2."""

    needs_batch = True

    def __init__(
        self,
        *,
        beta: NonNegative = 1.0,
        gamma: NonNegative = 1.0,
        temperature: Positive = 1.0,
    ) -> None:
        super().__init__()
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    @property
    def needs_tail(self) -> bool:
        """A class counts as much as any other over images, however small its probabilities are."""
        return self.temperature > 1 or self.gamma > 0

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return dist_loss(
            student.logits,
            teacher.softened(self.temperature),
            temperature=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
        )
