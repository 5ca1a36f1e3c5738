"""Distillation of standardised logits: how they compare, whatever their scale.

Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, CVPR 2024,
arXiv:2403.01427.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from distill.component import Positive
from distill.objectives._term import Term
from distill.objectives.kd import kd_loss
from distill.types import Batch, Outputs

EPSILON = 1e-7  # the paper's


def lskd_loss(
    student: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], *, temperature: float
) -> Float[Tensor, " B"]:
    """KD between Z(z) = (z − mean) / (deviation + 1e-7) of either network's logits.

    An affine change of the teacher's logits changes nothing, so a student need not be as sure as
    its teacher.

    Args:
        student: Student logits.
        teacher: Teacher logits over the same classes. They get no gradient.
        temperature: T > 0, in units of the logits' deviation.

    Returns:
        One value a sample, in nats times T².
    """
    return kd_loss(_standard(student), _standard(teacher), temperature=temperature)


def usual_temperature(num_classes: int) -> float:
    """√K / ln(1.5 (K − 1)), at which the surest logits there are give about 60 % for any K.

    Standardised, a one-hot logit stands about √K deviations above the others, so at a fixed T the
    most that a class can get depends on how many there are: at T = 2 it is the paper's 60 % of 100
    classes, but 35 % of 10. Of two classes only their order is left, at any T.
    """
    count = max(num_classes, 2)
    return math.sqrt(count) / math.log(1.5 * (count - 1))


def _standard(z: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    z = z.float()
    centred = z - z.mean(dim=1, keepdim=True)
    # The square root has no slope at 0, where all logits are equal.
    deviation = (centred.square().mean(dim=1, keepdim=True) + EPSILON**2).sqrt()
    return centred / (deviation + EPSILON)


class LSKD(Term):
    """Match how the classes compare, after standardising both sides; a usual weight is 9."""

    def __init__(self, *, temperature: Positive | None = None) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        temperature = self.temperature or usual_temperature(student.logits.shape[1])
        return lskd_loss(student.logits, teacher.logits, temperature=temperature)
