"""What teaches: a network, or a weighted ensemble of them, as a map from batch to `Outputs`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from distill.types import Batch, Outputs


class Teacher(Protocol):
    """Anything that says something of a batch."""

    def __call__(self, batch: Batch) -> Outputs:
        """What the teacher says of the batch's images, without gradients."""
        ...


class Live:
    """A frozen network, run on every batch."""

    def __init__(self, network: nn.Module) -> None:
        # A teacher left in train mode would move its BatchNorm statistics even without gradients.
        self.network = network.eval().requires_grad_(False)

    def __call__(self, batch: Batch) -> Outputs:
        """The network's outputs."""
        # Not inference_mode: autograd could not save its tensors for the student's backward.
        with torch.no_grad():
            outputs: Outputs = self.network(batch.images)
        return outputs


class Ensemble:
    """Several teachers as one classifier: its probabilities are the weighted mean of theirs."""

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float]) -> None:
        self.members = list(members)
        total = sum(weights)
        self.log_shares = [math.log(weight / total) for weight in weights]

    def __call__(self, batch: Batch) -> Outputs:
        """The log of the weighted mean of the members' probabilities, as logits."""
        logs = [
            member(batch).logits.float().log_softmax(dim=-1) + share
            for member, share in zip(self.members, self.log_shares, strict=True)
        ]
        return Outputs(torch.stack(logs).logsumexp(dim=0))
