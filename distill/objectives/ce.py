"""Cross-entropy with the labels: the part of the objective that needs no teacher.

Label smoothing: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: Rethinking the Inception Architecture
for Computer Vision, CVPR 2016, arXiv:1512.00567.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.component import Fraction
from distill.objectives._term import Term
from distill.types import Batch, Outputs


def ce_loss(
    student: Float[Tensor, "B K"], labels: Float[Tensor, "B K"], *, smoothing: float
) -> Float[Tensor, " B"]:
    """Cross-entropy of the student's classes under the labels: −Σ_k y_k log q_k.

    Args:
        student: Student logits.
        labels: Class probabilities: one-hot, or mixed by mixup and cutmix.
        smoothing: Part of the label's mass in [0, 1] that is spread evenly over all K classes.

    Returns:
        One value a sample, in nats.
    """
    return F.cross_entropy(student.float(), labels, label_smoothing=smoothing, reduction="none")


class CE(Term):
    """Match the labels."""

    needs_teacher = False
    needs_labels = True

    def __init__(self, *, smoothing: Fraction = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return ce_loss(student.logits, batch.labels, smoothing=self.smoothing)
