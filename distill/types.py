"""What flows through a run.

All are NamedTuples of tensors: DDP, `torch.compile` and pytrees take them as they are.
Axes: B samples, C channels, H W grid, K classes, A heads, N tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Batch(NamedTuple):
    """Training samples, with the key under which a cache would know them."""

    images: Float[Tensor, "B 3 H W"]  # in [0, 1]
    labels: Float[Tensor, "B K"]  # probabilities: one-hot, or mixed
    ids: Int[Tensor, " B"]  # position in the training split
    views: Int[Tensor, " B"]  # which augmented view of that sample
    shown: Float[Tensor, "B 3 H W"] | None = None  # to the teacher, where it sees another image
    cached: dict[str, Tensor] | None = None  # what a cache holds of the teacher's answers

    def rows(self, rows: slice | Tensor) -> Batch:
        """Some of the samples."""
        part: Batch = tree_map_only(Tensor, lambda column: column[rows], self)
        return part


class Outputs(NamedTuple):
    """What a network says of a batch. The same type for student and teacher."""

    logits: Float[Tensor, "B K"]
    features: dict[str, Tensor] | None = None  # by tap, those that were asked for; (B, ...)
    members: tuple[Outputs, ...] = ()  # an ensemble's, each as it answers alone
    shares: tuple[float, ...] = ()  # of the members, where their probabilities are averaged
    again: Outputs | None = None  # a student's of the other images that a term shows it

    def read(self, tap: str) -> Tensor:
        """A feature, in float32: autocast leaves halves, whose sums overflow."""
        assert self.features is not None, "nothing was tapped"
        return self.features[tap].float()

    def softened(self, temperature: float | Tensor) -> Float[Tensor, "B K"]:
        """The logits that speak at `temperature`.

        The members of an ensemble are softened before they are averaged: the mean of what each
        says at T, not what their mean would say at T.
        """
        if not self.shares:
            return self.logits
        logs = [
            (member.logits.float() / temperature).log_softmax(dim=-1) + math.log(share)
            for member, share in zip(self.members, self.shares, strict=True)
        ]
        return torch.stack(logs).logsumexp(dim=0) * temperature


class Losses(NamedTuple):
    """The objective's value, its unweighted parts, and the logits they were computed from."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]
    logits: Float[Tensor, "B K"]


class Site(NamedTuple):
    """A module whose output is a grid of features over the image."""

    name: str  # of the module, and of its tap
    channels: int
    grid: tuple[int, int]  # rows and columns
    stride: float  # pixels between two cells
    depth: float  # part of the network's layers that are done, in (0, 1]
    prefix: int  # tokens before the grid's: class, distillation, registers


class AttentionSite(NamedTuple):
    """A module inside of which tokens attend to each other."""

    name: str  # of its tap
    heads: int
    queries: tuple[int, int]  # grid of those that look
    keys: tuple[int, int]  # grid of those that are looked at; coarser where keys are reduced
    prefix: int  # tokens before the grid's, among queries and keys alike
    depth: float


class Anatomy(NamedTuple):
    """What a network computes on its way from an image to its logits, as shapes."""

    model: str  # as a recipe names it
    width: int  # of `pooled`, the vector that its classifier reads; 0: it has no classifier
    token: bool  # whether it has a distillation token with a head of its own
    sites: dict[str, Site]  # every module that gives a grid, in the order they are computed
    stages: tuple[Site, ...]  # where a stride ends with most of the network; or the last block
    blocks: tuple[Site, ...]  # equal ones in a row at one stride, such as a ViT's; else empty
    attention: tuple[AttentionSite, ...]  # in the order they are computed


class Pair(NamedTuple):
    """What a term may know before the first batch."""

    student: Anatomy
    teacher: Anatomy | None
    num_classes: int
    samples: Int[Tensor, " n"]  # ids of those that are trained on, ascending
