"""A ViT's first blocks are mimicked, its last generated from what a mask leaves of the student's.

Yang, Li, Zeng, Li, Yuan, Li: ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation,
2022, arXiv:2209.02432.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Fraction, NonNegative
from distill.errors import IncompatibleError
from distill.objectives._align import Resample, common
from distill.objectives._draws import uniform
from distill.objectives._term import Reads, Term
from distill.types import Batch, Outputs, Pair

MIMICKED = 2  # blocks, the first


def vitkd_loss(
    student: Float[Tensor, "B C h w"], teacher: Float[Tensor, "B C h w"]
) -> Float[Tensor, " B"]:
    """Squared error of two grids of features, summed over cells and channels.

    Args:
        student: Projected or generated features of the student.
        teacher: Those of the teacher. They get no gradient.

    Returns:
        One value a sample.
    """
    return (student.float() - teacher.detach().float()).square().sum(dim=(1, 2, 3))


class ViTKD(Term):
    """Mimic a ViT's first blocks and generate its last; a usual weight is 1, with these inside."""

    directions = "vit to vit"

    def __init__(
        self, *, alpha: NonNegative = 3e-5, beta: NonNegative = 3e-6, masked: Fraction = 0.5
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.masked = alpha, beta, masked

    @property
    def needs_tail(self) -> bool:
        """It reads no classes at all."""
        return False

    def connect(self, pair: Pair) -> None:
        """Take the first two blocks and the last of either; refuse networks that have stages."""
        assert pair.teacher is not None
        for side in (pair.student, pair.teacher):
            if len(side.blocks) <= MIMICKED:
                raise IncompatibleError(
                    f"{side.model} is no row of {MIMICKED + 1} and more equal blocks",
                    hint="term features works for every pair",
                )
        own, other = (
            (*side.blocks[:MIMICKED], side.blocks[-1]) for side in (pair.student, pair.teacher)
        )
        self.reads = Reads(tuple(a.name for a in own), tuple(b.name for b in other))
        grids = [common(a.grid, b.grid, "min") for a, b in zip(own, other, strict=True)]
        self.bridges = nn.ModuleList(Resample(a.grid, g) for a, g in zip(own, grids, strict=True))
        self.targets = nn.ModuleList(Resample(b.grid, g) for b, g in zip(other, grids, strict=True))
        self.channels = nn.ModuleList(
            nn.Conv2d(a.channels, b.channels, 1) for a, b in zip(own, other, strict=True)
        )
        wide = other[-1].channels
        self.mask = nn.Parameter(torch.randn(wide, 1, 1) * 0.02)
        self.generate = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU(), nn.Conv2d(wide, wide, 3, padding=1)
        )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        projected = [
            channels(bridge(student.read(name)))
            for name, channels, bridge in zip(
                self.reads.student, self.channels, self.bridges, strict=True
            )
        ]
        told = [
            target(teacher.read(name))
            for name, target in zip(self.reads.teacher, self.targets, strict=True)
        ]
        mimicked = torch.stack([vitkd_loss(projected[i], told[i]) for i in range(MIMICKED)])
        last = self._masked(projected[-1], batch)
        generated = vitkd_loss(self.generate(last), told[-1])
        # The paper's own weight: what is hidden is that much harder to tell.
        part = max(self.masked, 1e-6)
        return self.alpha * mimicked.sum(dim=0) + self.beta / part * generated

    def _masked(self, x: Float[Tensor, "B C h w"], batch: Batch) -> Float[Tensor, "B C h w"]:
        """Cells replaced by a learned vector: which, is a pure function of sample and view."""
        hidden = uniform(batch, x.shape[2] * x.shape[3], salt=4) < self.masked
        return torch.where(hidden.view(-1, 1, *x.shape[2:]), self.mask.to(x.dtype), x)
