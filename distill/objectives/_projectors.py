"""Maps from the student's channels to the teacher's, learned with the student and then dropped.

Never the other way: a learned projection of the teacher could make both sides constant.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from distill.component import Projector


def build(kind: Projector, channels: int, target: int) -> nn.Module:
    """Grids (B, channels, h, w) as grids (B, target, h, w).

    Args:
        kind: `linear`, one matrix for every cell; `mlp`, two with twice the target's channels
            between them; `conv`, 3 x 3 cells; `attention`, a transformer's block over all cells,
            then a matrix; `orthogonal`, a matrix whose rows or columns are orthonormal, which
            keeps distances (Miles et al.: V_k D, CVPR 2024, arXiv:2403.06213).
        channels: The student's.
        target: The teacher's.
    """
    norm = nn.GroupNorm(1, channels)  # a student's scale is its own affair
    match kind:
        case "linear":
            return nn.Sequential(norm, nn.Conv2d(channels, target, 1))
        case "mlp":
            wide = nn.Conv2d(channels, 2 * target, 1)
            return nn.Sequential(norm, wide, nn.GELU(), nn.Conv2d(2 * target, target, 1))
        case "conv":
            return nn.Sequential(norm, nn.Conv2d(channels, target, 3, padding=1))
        case "attention":
            return nn.Sequential(_Block(channels), nn.Conv2d(channels, target, 1))
        case "orthogonal":
            return _Orthogonal(channels, target)


class _Block(nn.Module):
    """A transformer's block, pre-norm, over the cells of a grid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.mlp = nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, 2 * channels, 1),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, 1),
        )

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.proj(attended)
        y: Tensor = x + self.mlp(x)
        return y


class _Orthogonal(nn.Module):
    """One matrix for every cell, kept orthonormal by Cayley's transform of what is learned."""

    def __init__(self, channels: int, target: int) -> None:
        super().__init__()
        linear = nn.Linear(channels, target, bias=False)
        self.linear = orthogonal(linear, orthogonal_map="cayley")

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        y: Tensor = self.linear(x.movedim(1, -1)).movedim(-1, 1)
        return y
