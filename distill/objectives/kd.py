"""Soft-label distillation.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.component import Positive
from distill.errors import RecipeError
from distill.objectives._term import Term
from distill.types import Batch, Outputs


def kd_loss(
    student: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], *, temperature: float | Tensor
) -> Float[Tensor, " B"]:
    """KL divergence from the teacher's softened classes to the student's, times T².

    Σ_k p_k (log p_k − log q_k), where p and q are the softmax of the teacher's and the student's
    logits over T. Its gradient shrinks as 1/T²; the factor T² undoes that (section 2 of the
    paper), so that a weight means the same at every temperature.

    Args:
        student: Student logits.
        teacher: Teacher logits over the same classes. They get no gradient.
        temperature: T > 0; at 1 the classes are as predicted, higher is softer.

    Returns:
        One value a sample, in nats times T².
    """
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1) * temperature**2


class KD(Term):
    """Match the teacher's softened class probabilities; at several temperatures, their mean."""

    def __init__(self, *, temperature: Positive | list[Positive] = 4.0) -> None:
        super().__init__()
        self.temperatures = temperature if isinstance(temperature, list) else [temperature]
        if not self.temperatures:
            raise RecipeError("kd: temperature: an empty list", hint="temperature: 4, or [2, 4, 8]")

    @property
    def needs_tail(self) -> bool:
        """At T = 1 the mass is where the teacher's first classes are; above, the tail counts."""
        return max(self.temperatures) > 1

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        losses = [
            kd_loss(student.logits, teacher.softened(temperature), temperature=temperature)
            for temperature in self.temperatures
        ]
        return torch.stack(losses).mean(dim=0) if len(losses) > 1 else losses[0]
