"""Attention maps of the student like the teacher's, whatever their heads, tokens and windows.

Rows of maps compared by KL: Wang et al.: MiniLM, NeurIPS 2020, arXiv:2002.10957.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.objectives._align import ResampleMaps, attending, common
from distill.objectives._term import Reads, Term
from distill.types import Batch, Outputs, Pair

LEAST = 1e-8  # of a key's part in a row: the logarithm of 0 has no gradient


def attention_loss(
    student: Float[Tensor, "B A N N"],
    teacher: Float[Tensor, "B A N N"],
    *,
    kind: Literal["kl", "mse"],
) -> Float[Tensor, " B"]:
    """The distance of two attention maps, both already softmaxed: no softmax is taken again.

    KL is Σ_k a_k (log a_k − log b_k) / ln N with the teacher's row a and the student's b: 1 is what
    a uniform row is from one that looks at a single key. MSE is N times the mean squared
    difference, since an entry is 1/N in the mean.

    Args:
        student: Rows sum to 1.
        teacher: Likewise, with as many heads. They get no gradient.
        kind: Which of the two.

    Returns:
        One value a sample, the mean over heads and rows.
    """
    student, teacher = student.float(), teacher.detach().float()
    tokens = student.shape[-1]
    if kind == "mse":
        return tokens * (student - teacher).square().mean(dim=(1, 2, 3))
    own, other = ((a + LEAST) / (1 + tokens * LEAST) for a in (student, teacher))
    rows = (other * (other.log() - own.log())).sum(dim=-1)
    return rows.mean(dim=(1, 2)) / max(math.log(tokens), 1.0)


class Attention(Term):
    """Match which cells look at which, in the last layers of both; a usual weight is 1."""

    reads_classes = False
    directions = "vit to vit"

    def __init__(
        self,
        *,
        kind: Literal["kl", "mse"] = "kl",
        layers: Literal["last", "last2"] = "last2",
        heads: Literal["mean", "max"] = "mean",
    ) -> None:
        super().__init__()
        self.kind: Literal["kl", "mse"] = kind
        self.count = 1 if layers == "last" else 2
        self.heads = heads

    def connect(self, pair: Pair) -> None:
        """Choose the layers, from the last of each backwards, and their common grid."""
        assert pair.teacher is not None
        own, other = (attending(side, self.count) for side in (pair.student, pair.teacher))
        matched = list(zip(reversed(own), reversed(other), strict=False))
        self.reads = Reads(tuple(a.name for a, _ in matched), tuple(b.name for _, b in matched))
        self.bridges, self.targets = nn.ModuleList(), nn.ModuleList()
        for a, b in matched:
            grid = common(a.queries, b.queries, "min")
            both = a.prefix > 0 and b.prefix > 0
            self.bridges.append(ResampleMaps(a, grid, prefix=both))
            self.targets.append(ResampleMaps(b, grid, prefix=both))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        losses = []
        for own, other, bridge, target in zip(
            self.reads.student, self.reads.teacher, self.bridges, self.targets, strict=True
        ):
            a, b = self._one(student.read(own)), self._one(teacher.read(other))
            losses.append(attention_loss(bridge(a), target(b), kind=self.kind))
        return torch.stack(losses).mean(dim=0)

    def _one(self, maps: Float[Tensor, "B A N N"]) -> Float[Tensor, "B 1 N N"]:
        """One head for all: their mean, or where any of them looks."""
        if self.heads == "mean":
            return maps.mean(dim=1, keepdim=True)
        most = maps.amax(dim=1, keepdim=True)
        return most / most.sum(dim=-1, keepdim=True)
