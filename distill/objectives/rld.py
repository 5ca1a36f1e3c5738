"""Labels refine what the teacher says: a wrong teacher teaches no wrong class.

Sun, Gong, Chen, Bai, Shen, Ye: Knowledge Distillation with Refined Logits, 2024, arXiv:2408.07703.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from distill.component import NonNegative, Positive
from distill.objectives._term import Term
from distill.objectives.dkd import divergence, label_and_rest
from distill.types import Batch, Outputs


def rld_loss(
    student: Float[Tensor, "B K"],
    teacher: Float[Tensor, "B K"],
    target: Int[Tensor, " B"],
    *,
    temperature: float,
    sample_temperature: float,
    alpha: float,
    beta: float,
    softened: Float[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    """α τ² KL(b_t ‖ b_s) + β T² KL(p̂_t ‖ p̂_s), refined by the label y.

    b_t = (max_k p_t,k, the rest) stands for how sure the teacher is of whatever it thinks, and
    b_s = (p_s,y, the rest) for how sure the student is of the label, both at τ. p̂ is the softmax at
    T over the classes that the teacher ranks below the label: what it ranks as high or higher is
    left out on both sides.

    Args:
        student: Student logits.
        teacher: Teacher logits over the same classes. They get no gradient.
        target: Class y of every sample.
        temperature: T > 0.
        sample_temperature: τ > 0.
        alpha: Weight of the first part.
        beta: Weight of the second.
        softened: Logits that speak for the teacher at T, where they are others, as an ensemble's.

    Returns:
        One value a sample, in nats times τ² and T².
    """
    own, other = student.float(), teacher.detach().float()
    tau = sample_temperature
    sure = label_and_rest(other / tau, other.argmax(dim=1))
    first = divergence(sure, label_and_rest(own / tau, target))
    below = other < other.gather(1, target[:, None])
    soft = other if softened is None else softened.detach().float()
    log_p, log_q = (_among(z / temperature, below) for z in (soft, own))
    second = torch.where(below, log_p.exp() * (log_p - log_q), 0.0).sum(dim=1)
    return alpha * tau**2 * first + beta * temperature**2 * second


def _among(z: Float[Tensor, "B K"], kept: Tensor) -> Float[Tensor, "B K"]:
    """Logarithms of the probabilities among the kept classes; 0 for others, and if none is kept."""
    # The least finite number, and not −∞: a row without any kept class has a softmax too.
    masked = torch.where(kept, z, torch.finfo(torch.float32).min)
    return torch.where(kept, F.log_softmax(masked, dim=1), 0.0)


class RLD(Term):
    """Match what the teacher says where the label bears it out; ramp its weight up first."""

    needs_labels = True

    def __init__(
        self,
        *,
        alpha: NonNegative = 1.0,
        beta: NonNegative = 8.0,
        temperature: Positive = 4.0,
        sample_temperature: Positive = 1.0,
    ) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.temperature, self.sample_temperature = temperature, sample_temperature

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return rld_loss(
            student.logits,
            teacher.softened(self.sample_temperature),
            batch.labels.argmax(dim=1),  # of mixed labels the larger
            temperature=self.temperature,
            sample_temperature=self.sample_temperature,
            alpha=self.alpha,
            beta=self.beta,
            softened=teacher.softened(self.temperature),
        )
