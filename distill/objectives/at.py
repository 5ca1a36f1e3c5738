"""Where features are strong: one map for all channels, so that no projector is needed.

Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Stages
from distill.errors import IncompatibleError
from distill.objectives._align import Resample, common, match
from distill.objectives._term import Reads, Term
from distill.types import Batch, Outputs, Pair


def at_loss(
    student: Float[Tensor, "B h w"], teacher: Float[Tensor, "B h w"]
) -> Float[Tensor, " B"]:
    """Mean squared difference of two maps, each scaled to length 1.

    Args:
        student: Mean of the squared channels of the student's features.
        teacher: Likewise; it gets no gradient.

    Returns:
        One value a sample, the mean over cells: with it the paper's weight is 1000.
    """
    own, other = (F.normalize(x.float().flatten(1), dim=1) for x in (student, teacher.detach()))
    return (own - other).square().mean(dim=1)


def energy(features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B h w"]:
    """The mean of the squared channels, over its largest value: large features would overflow."""
    features = features.float()
    largest = features.detach().abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    return (features / largest).square().mean(dim=1)


class AT(Term):
    """Match where features are strong, in stages of both networks; a usual weight is 1000."""

    reads_classes = False

    def __init__(self, *, stages: Stages = "last2", pairs: list[list[str]] | None = None) -> None:
        super().__init__()
        self.stages: Stages = stages
        self.pairs = pairs

    def connect(self, pair: Pair) -> None:
        """Choose the pairs of sites, and their common grids; on one cell all maps are alike.

        Raises:
            IncompatibleError: If no two sites have more than one cell in common.
        """
        matched = [
            (own, other, grid)
            for own, other in match(pair, self.stages, self.pairs)
            if math.prod(grid := common(own.grid, other.grid, "min")) > 1
        ]
        if not matched:
            raise IncompatibleError(
                "the two have one cell in common, which says of no place that it is strong",
                hint="stages: all, or term features",
            )
        self.matched = [(own.name, other.name) for own, other, _ in matched]
        self.reads = Reads.of(self.matched)
        self.bridges = nn.ModuleList(Resample(own.grid, grid) for own, _, grid in matched)
        self.targets = nn.ModuleList(Resample(other.grid, grid) for _, other, grid in matched)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        losses = []
        for (own, other), bridge, target in zip(
            self.matched, self.bridges, self.targets, strict=True
        ):
            a = bridge(energy(student.read(own))[:, None])[:, 0]
            b = target(energy(teacher.read(other))[:, None])[:, 0]
            losses.append(at_loss(a, b))
        return torch.stack(losses).mean(dim=0)
