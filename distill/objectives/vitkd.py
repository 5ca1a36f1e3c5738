"""A ViT's first blocks are mimicked, its last generated from what a mask leaves of the student's.

Yang, Li, Zeng, Li, Yuan, Li: ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation,
2022, arXiv:2209.02432.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distill.component import Fraction, NonNegative
from distill.errors import IncompatibleError
from distill.objectives._align import Grid, Resample, common
from distill.objectives._draws import uniform
from distill.objectives._term import Reads, Term
from distill.types import Anatomy, Batch, Outputs, Pair, Site

MIMICKED = 2  # blocks, the first


def vitkd_loss(
    student: Float[Tensor, "B C h w"],
    teacher: Float[Tensor, "B C h w"],
    hidden: Bool[Tensor, "B 1 h w"] | None = None,
) -> Float[Tensor, " B"]:
    """Squared error of two grids of features, summed over cells and channels.

    Args:
        student: Projected or generated features of the student.
        teacher: Those of the teacher. They get no gradient.
        hidden: The cells that count; all of them if left out.

    Returns:
        One value a sample.
    """
    error = (student.float() - teacher.detach().float()).square()
    if hidden is not None:
        error = torch.where(hidden, error, 0.0)
    return error.sum(dim=(1, 2, 3))


def hidden_cells(batch: Batch, grid: Grid, *, masked: float) -> Bool[Tensor, "B 1 h w"]:
    """Cells of a grid that a mask covers, equally many in every sample.

    Which they are is a pure function of sample and view.

    Args:
        batch: The samples.
        grid: Rows and columns.
        masked: Part of the cells in [0, 1]; the number is rounded up.
    """
    cells = grid[0] * grid[1]
    ranks = uniform(batch, cells, salt=4).argsort(dim=1).argsort(dim=1)
    return (ranks < math.ceil(masked * cells)).view(-1, 1, *grid)


class ViTKD(Term):
    """Mimic a ViT's first blocks and generate its last; a usual weight is 1, with these inside."""

    reads_classes = False
    directions = "vit to vit"

    def __init__(
        self, *, alpha: NonNegative = 3e-5, beta: NonNegative = 3e-6, masked: Fraction = 0.5
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.masked = alpha, beta, masked

    def connect(self, pair: Pair) -> None:
        """Take the first two blocks and the end of either; refuse networks that have stages."""
        assert pair.teacher is not None
        own, other = (
            (*_blocks(side)[:MIMICKED], _end(side)) for side in (pair.student, pair.teacher)
        )
        self.reads = Reads(tuple(a.name for a in own), tuple(b.name for b in other))
        grids = [common(a.grid, b.grid, "min") for a, b in zip(own, other, strict=True)]
        self.bridges = nn.ModuleList(Resample(a.grid, g) for a, g in zip(own, grids, strict=True))
        self.targets = nn.ModuleList(Resample(b.grid, g) for b, g in zip(other, grids, strict=True))
        self.channels = nn.ModuleList(
            nn.Conv2d(a.channels, b.channels, 1) for a, b in zip(own, other, strict=True)
        )
        wide = other[-1].channels
        self.mask = nn.Parameter(torch.zeros(wide, 1, 1))
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
        seen = projected[-1]
        hidden = hidden_cells(batch, (seen.shape[2], seen.shape[3]), masked=self.masked)
        generated = self.generate(torch.where(hidden, self.mask.to(seen.dtype), seen))
        guessed = vitkd_loss(generated, told[-1], hidden)
        # Only what is hidden has to be told, so that beta is over its part of the cells.
        return self.alpha * mimicked.sum(dim=0) + self.beta / max(self.masked, 1e-6) * guessed


def _blocks(side: Anatomy) -> tuple[Site, ...]:
    if len(side.blocks) <= MIMICKED:
        raise IncompatibleError(
            f"{side.model} is no row of {MIMICKED + 1} and more equal blocks",
            hint="term features works for every pair",
        )
    return side.blocks


def _end(side: Anatomy) -> Site:
    """What comes last on the grid of the blocks: their norm, as in the paper's own code."""
    last = side.blocks[-1]
    alike = (last.grid, last.channels)
    return [site for site in side.sites.values() if (site.grid, site.channels) == alike][-1]
