"""What flows through a run.

All are NamedTuples of tensors: DDP, `torch.compile` and pytrees take them as they are.
Axes: B samples, C channels, H W grid, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

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
    features: dict[str, Tensor] | None = None  # by name, where they were asked for; (B, ...)


class Losses(NamedTuple):
    """The objective's value, its unweighted parts, and the logits they were computed from."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]
    logits: Float[Tensor, "B K"]
