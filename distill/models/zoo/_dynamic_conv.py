"""A depthwise convolution whose kernels follow from the image.

Chen et al.: Dynamic Convolution: Attention over Convolution Kernels, CVPR 2020, arXiv:1912.03458.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.models.grids import Size
from distill.models.zoo._attention import Linear

KERNELS = 4  # of every layer, and the squeezing to a quarter of the channels: the paper's
SQUEEZE = 4


class DynamicConv(nn.Module):
    """Mix each sample's tokens with its own 3 x 3 kernels, Σ_k π_k W_k, between two linear maps.

    π is the softmax of a small network of the mean token. The linear maps are those in front of and
    behind attention. The paper divides by a temperature that falls from 30 to 1, so that at first
    all kernels learn; behind a LayerNorm π is nearly even at first by itself.
    """

    def __init__(self, width: int, *, linear: Linear = nn.Linear) -> None:
        super().__init__()
        hidden = max(width // SQUEEZE, 1)
        self.weight = nn.Parameter(torch.empty(KERNELS, width, 3, 3))
        # The scale stays: nine values of variance 1, times a kernel of variance 1/9 each. Mixed
        # evenly, four such kernels have half the spread.
        nn.init.normal_(self.weight, std=(KERNELS / 9) ** 0.5)
        self.mixture = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, KERNELS)
        )
        self.value = linear(width, width)
        self.proj = linear(width, width)

    def kernels(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B D 3 3"]:
        """The kernels of each sample."""
        mixture = self.mixture(x.mean(dim=1)).softmax(dim=-1)
        return torch.einsum("bk,kdij->bdij", mixture, self.weight)

    def forward(self, x: Float[Tensor, "B N D"], grid: Size) -> Float[Tensor, "B N D"]:
        value = torch.unflatten(self.value(x).transpose(1, 2), 2, grid)
        kernels = self.kernels(x).flatten(0, 1)[:, None]
        # Every sample's channels are groups of one convolution.
        mixed = F.conv2d(value.flatten(0, 1)[None], kernels, padding=1, groups=kernels.shape[0])
        mixed = torch.unflatten(mixed[0], 0, (x.shape[0], x.shape[2]))
        x = self.proj(mixed.flatten(2).transpose(1, 2))
        return x
