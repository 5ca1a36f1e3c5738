"""Knowledge review: stages of the student, the later mixed into each, learn from the teacher's.

Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Count, Stages
from distill.objectives._align import Resample, common, match
from distill.objectives._term import Reads, Term
from distill.types import Batch, Outputs, Pair

LEVELS = (4, 2, 1)  # cells along a side of the coarser grids, each of half the weight


def review_loss(
    student: Float[Tensor, "B C h w"], teacher: Float[Tensor, "B C h w"]
) -> Float[Tensor, " B"]:
    """Mean squared error on the whole grid and on grids of 4, 2 and 1 cells a side.

    The coarser count 1/2, 1/4 and 1/8, all over the sum of the weights; those that are not coarser
    than the grid are left out.

    Args:
        student: Fused features of the student.
        teacher: Those of the teacher. They get no gradient.

    Returns:
        One value a sample.
    """
    own, other = student.float(), teacher.detach().float()
    total = (own - other).square().mean(dim=(1, 2, 3))
    weight, weights = 1.0, 1.0
    for side in LEVELS:
        if side >= min(own.shape[2:]):
            continue
        weight /= 2
        weights += weight
        a, b = (F.adaptive_avg_pool2d(x, side) for x in (own, other))
        total = total + weight * (a - b).square().mean(dim=(1, 2, 3))
    return total / weights


class Review(Term):
    """Match stages, the student's later ones mixed into each; a usual weight is 0.5 to 1."""

    reads_classes = False

    def __init__(self, *, stages: Stages = "all", width: Count = 64) -> None:
        super().__init__()
        self.stages: Stages = stages
        self.width = width

    def connect(self, pair: Pair) -> None:
        """Choose the pairs of sites, and build what mixes the student's from deep to shallow."""
        matched = match(pair, self.stages)
        self.matched = [(own.name, other.name) for own, other in matched]
        self.reads = Reads.of(self.matched)
        self.fusions, self.targets = nn.ModuleList(), nn.ModuleList()
        deeper = None
        for own, other in reversed(matched):
            grid = common(own.grid, other.grid, "min")
            later = None if deeper is None else Resample(deeper, grid)
            bridge = Resample(own.grid, grid)
            self.fusions.append(_Fusion(own.channels, other.channels, self.width, bridge, later))
            self.targets.append(Resample(other.grid, grid))
            deeper = grid

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        losses, mixed = [], None
        for (own, other), fusion, target in zip(
            reversed(self.matched), self.fusions, self.targets, strict=True
        ):
            mixed, shown = fusion(student.read(own), mixed)
            losses.append(review_loss(shown, target(teacher.read(other))))
        return torch.stack(losses).sum(dim=0)


class _Fusion(nn.Module):
    """A stage and what was mixed of the later ones, each weighted in every cell by the two.

    GroupNorm stands where the paper has BatchNorm: an image's loss is its own.
    """

    def __init__(
        self, channels: int, target: int, width: int, bridge: Resample, later: Resample | None
    ) -> None:
        super().__init__()
        self.bridge, self.later = bridge, later
        self.enter = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.GroupNorm(1, width)
        )
        self.weigh = None if later is None else nn.Conv2d(2 * width, 2, 1)
        self.leave = nn.Sequential(
            nn.Conv2d(width, target, 3, padding=1, bias=False), nn.GroupNorm(1, target)
        )

    def forward(self, x: Tensor, mixed: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.enter(self.bridge(x))
        if self.weigh is not None:
            assert mixed is not None
            assert self.later is not None
            mixed = self.later(mixed)
            parts = self.weigh(torch.cat([x, mixed], dim=1)).sigmoid()
            x = x * parts[:, :1] + mixed * parts[:, 1:]
        return x, self.leave(x)
