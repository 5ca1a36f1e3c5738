"""Features of the student like the teacher's, cell by cell, whatever the two networks are.

FitNets: Romero et al.: FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv:1412.6550. The
standardised teacher and the loss of cosine and smooth L1 are those of Sariyildiz et al.: UNIC,
ECCV 2024, arXiv:2408.05088.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Projector, Stages
from distill.objectives import _projectors
from distill.objectives._align import Resample, common, match
from distill.objectives._standard import Standard
from distill.objectives._term import Reads, Term
from distill.types import Batch, Outputs, Pair


def features_loss(
    student: Float[Tensor, "B C h w"],
    teacher: Float[Tensor, "B C h w"],
    *,
    kind: Literal["cosine", "mse"],
) -> Float[Tensor, " B"]:
    """The distance of two grids of features: ½ (1 − cosine) + ½ smooth L1, or mean squared error.

    The cosine is that of each cell's channels, smooth L1 and squared error are means over cells and
    channels.

    Args:
        student: Projected features of the student.
        teacher: Those of the teacher, standardised. They get no gradient.
        kind: Which of the two.

    Returns:
        One value a sample.
    """
    student, teacher = student.float(), teacher.detach().float()
    if kind == "mse":
        return (student - teacher).square().mean(dim=(1, 2, 3))
    angle = 1 - F.cosine_similarity(student, teacher, dim=1).mean(dim=(1, 2))
    distance = F.smooth_l1_loss(student, teacher, reduction="none").mean(dim=(1, 2, 3))
    return (angle + distance) / 2


class Features(Term):
    """Match the teacher's features on a common grid; a usual weight is 0.3 to 1."""

    reads_classes = False

    def __init__(
        self,
        *,
        stages: Stages = "last2",
        pairs: list[list[str]] | None = None,
        projector: Projector = "linear",
        kind: Literal["cosine", "mse"] = "cosine",
        grid: Literal["min", "max"] = "min",
        standardise: bool = True,
    ) -> None:
        super().__init__()
        self.stages: Stages = stages
        self.projector: Projector = projector
        self.kind: Literal["cosine", "mse"] = kind
        self.grid: Literal["min", "max"] = grid
        self.pairs, self.standardise = pairs, standardise

    def connect(self, pair: Pair) -> None:
        """Choose the pairs of sites, and build a projector for each."""
        matched = match(pair, self.stages, self.pairs)
        self.matched = [(a.name, b.name) for a, b in matched]
        self.reads = Reads.of(self.matched)
        self.bridges = nn.ModuleList()
        self.targets = nn.ModuleList()
        for a, b in matched:
            grid = common(a.grid, b.grid, self.grid)
            smooth = self.grid == "max"
            self.bridges.append(
                nn.Sequential(
                    _projectors.build(self.projector, a.channels, b.channels),
                    Resample(a.grid, grid, bilinear=smooth),
                )
            )
            standard = Standard(b.channels) if self.standardise else nn.Identity()
            self.targets.append(nn.Sequential(Resample(b.grid, grid, bilinear=smooth), standard))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        losses = [
            features_loss(bridge(student.read(own)), target(teacher.read(other)), kind=self.kind)
            for (own, other), bridge, target in zip(
                self.matched, self.bridges, self.targets, strict=True
            )
        ]
        return torch.stack(losses).mean(dim=0)
