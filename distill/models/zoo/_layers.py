"""Small layers that blocks of every kind are made of."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.models.grids import Size

EPS = 1e-6  # of every LayerNorm, as in the transformers for images since the first


class DropPath(nn.Module):
    """Skip a branch for whole samples, and scale the rest so that the mean stays."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class LayerScale(nn.Module):
    """x times a learned factor a channel, small at first: a deep network begins as the identity.

    Touvron et al.: Going deeper with Image Transformers, ICCV 2021, arXiv:2103.17239.
    """

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return x * self.factor


class LocalPosition(nn.Module):
    """x + depthwise 3 x 3 convolution on the patch grid; the zero border tells where a patch is.

    Tokens in front of the patches have no place in the image and pass.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Float[Tensor, "B N D"], grid: Size) -> Float[Tensor, "B N D"]:
        prefix = x.shape[1] - grid[0] * grid[1]
        patches = x[:, prefix:]
        near = torch.unflatten(patches.transpose(1, 2), 2, grid)
        near = self.conv(near).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :prefix], patches + near], dim=1)
