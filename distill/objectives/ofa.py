"""Every stage of the student answers by itself, so that features are compared as classes.

Hao, Guo, Han, Tang, Hu, Wang, Xu: One-for-All: Bridge the Gap Between Heterogeneous Architectures
in Knowledge Distillation, NeurIPS 2023, arXiv:2310.19444.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.component import Positive, Stages
from distill.objectives._align import chosen
from distill.objectives._term import Reads, Term
from distill.types import Batch, Outputs, Pair, Site


def ofa_loss(
    student: Float[Tensor, "B K"],
    teacher: Float[Tensor, "B K"],
    target: Int[Tensor, " B"],
    *,
    epsilon: float,
) -> Float[Tensor, " B"]:
    """−((1 + t_y)^ε − 1) log s_y − Σ_k≠y t_k^ε log s_k: the true class counts more as ε grows.

    t and s are the probabilities of the classes. At ε = 1 it is cross-entropy with the teacher's.

    Args:
        student: Logits of the student, or of one of its stages.
        teacher: Teacher logits over the same classes. They get no gradient.
        target: Class y of every sample.
        epsilon: Power ε > 0, in the paper 1 to 1.5.

    Returns:
        One value a sample, in nats.
    """
    t = F.softmax(teacher.detach().float(), dim=1)
    y = torch.zeros_like(t).scatter(1, target[:, None], 1.0)
    weight = (t + y) ** epsilon - y
    return -(weight * F.log_softmax(student.float(), dim=1)).sum(dim=1)


class OFA(Term):
    """Have every stage of the student say the teacher's classes; a usual weight is 1."""

    needs_labels = True

    def __init__(self, *, epsilon: Positive = 1.5, stages: Stages = "all") -> None:
        super().__init__()
        self.epsilon = epsilon
        self.stages: Stages = stages

    @property
    def needs_tail(self) -> bool:
        """At ε of 1 and more the mass is where the teacher's first classes are."""
        return self.epsilon < 1

    def connect(self, pair: Pair) -> None:
        """Build a head for each of the student's stages; of the teacher only logits are read."""
        sites = chosen(pair.student, self.stages)
        self.reads = Reads(tuple(site.name for site in sites))
        self.heads = nn.ModuleList(_head(site, pair.num_classes) for site in sites)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        told = [student.logits]
        told += [
            head(student.read(name))
            for head, name in zip(self.heads, self.reads.student, strict=True)
        ]
        # A mixed y would leave classes with less than no weight; of mixed labels the larger counts.
        target = batch.labels.argmax(dim=1)
        losses = [ofa_loss(z, teacher.logits, target, epsilon=self.epsilon) for z in told]
        return torch.stack(losses).sum(dim=0)


def _head(site: Site, num_classes: int) -> nn.Module:
    """Two depthwise separable convolutions, the mean over cells, and a classifier."""
    channels = site.channels
    layers: list[nn.Module] = [nn.GroupNorm(1, channels)]
    for _ in range(2):
        layers += [
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.GroupNorm(1, channels),
            nn.ReLU(),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    )
