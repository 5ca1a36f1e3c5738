"""A teacher's features on a scale that a student can learn.

Sariyildiz et al.: UNIC, ECCV 2024, arXiv:2408.05088.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.objectives._gather import whole


class Standard(nn.Module):
    """A teacher's features with mean 0 and deviation 1 in each channel, over all images so far.

    A transformer's few outlying channels would be most of any distance. Mean and deviation follow
    the batches: exactly the first, then a tenth of each.
    """

    MOMENTUM = 0.1
    LEAST = 1e-3  # deviation; a channel that never changes is not blown up

    mean: Tensor
    deviation: Tensor
    batches: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("deviation", torch.ones(channels, 1, 1))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        if self.training:
            with torch.no_grad():
                variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
                means = whole(mean[None])  # of every process, whose batches are equally large
                variance = whole(variance[None]).mean(dim=0) + means.var(dim=0, correction=0)
                mean = means.mean(dim=0)
                part = torch.where(self.batches > 0, self.MOMENTUM, 1.0)
                self.mean.lerp_(mean[:, None, None], part)
                self.deviation.lerp_(variance.sqrt()[:, None, None], part)
                self.batches.add_(1)
        return (x - self.mean) / self.deviation.clamp_min(self.LEAST)
