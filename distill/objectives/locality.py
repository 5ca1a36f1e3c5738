"""A small CNN shows a ViT the local features of its stages, where images are few.

Li, Wang, Yang, Chen, Zhang, Ouyang: Locality Guidance for Improving Vision Transformers on Tiny
Datasets, ECCV 2022, arXiv:2207.10026.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.component import Stages
from distill.objectives._align import Resample, common, match
from distill.objectives._term import Reads, Term
from distill.objectives.features import features_loss
from distill.types import Batch, Outputs, Pair


class Locality(Term):
    """Match three stages on the finer grid, added up; a usual weight is 2.5."""

    reads_classes = False

    def __init__(self, *, stages: Stages = "lg", pairs: list[list[str]] | None = None) -> None:
        super().__init__()
        self.stages: Stages = stages
        self.pairs = pairs

    def connect(self, pair: Pair) -> None:
        """Choose the pairs of sites; each gets one matrix of its own for the channels."""
        matched = match(pair, self.stages, self.pairs)
        self.matched = [(own.name, other.name) for own, other in matched]
        self.reads = Reads.of(self.matched)
        self.bridges, self.targets = nn.ModuleList(), nn.ModuleList()
        for own, other in matched:
            grid = common(own.grid, other.grid, "max")
            channels = nn.Conv2d(own.channels, other.channels, 1)
            resample = Resample(own.grid, grid, bilinear=True)
            self.bridges.append(nn.Sequential(channels, resample))
            self.targets.append(Resample(other.grid, grid, bilinear=True))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        losses = [
            features_loss(bridge(student.read(own)), target(teacher.read(other)), kind="mse")
            for (own, other), bridge, target in zip(
                self.matched, self.bridges, self.targets, strict=True
            )
        ]
        return torch.stack(losses).sum(dim=0)
