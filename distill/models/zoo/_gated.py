"""Attention that begins as a convolution and may leave off.

d'Ascoli et al.: ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases,
ICML 2021, arXiv:2103.10697.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.models.grids import Size
from distill.models.zoo._attention import join, split


class GatedAttention(nn.Module):
    """((1 − σ(λ)) softmax(Q Kᵀ / √d) + σ(λ) softmax(v · r)) V in every head.

    r = (δx, δy, δx² + δy²) is the offset from a query's patch to a key's; v and the gate λ are
    learned in each head.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.gate = nn.Parameter(torch.empty(heads))
        self.v_position = nn.Parameter(torch.empty(heads, 3))
        self.qk = nn.Linear(width, 2 * width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.attn_drop = nn.Dropout(0.0)  # drops nothing: maps that are mixed are looked for here
        self.proj = nn.Linear(width, width)
        self.localise()

    @torch.no_grad()
    def localise(self) -> None:
        """Make the heads those of a k x k convolution, k² = heads, in place.

        Each looks at an offset Δ of its own, v · r = −|δ − Δ|² but for what is the same for all
        keys, and hands on its channels as they are. With λ = 1 this has 73 % of the weight.
        """
        side = math.isqrt(self.heads)
        offsets = torch.arange(side) - (side - 1) / 2
        self.v_position[:, 0] = 2 * offsets.repeat(side)
        self.v_position[:, 1] = 2 * offsets.repeat_interleave(side)
        self.v_position[:, 2] = -1
        nn.init.ones_(self.gate)
        nn.init.eye_(self.v.weight)

    def forward(self, x: Float[Tensor, "B N D"], grid: Size) -> Float[Tensor, "B N D"]:
        q, k = split(self.qk(x), self.heads, 2)
        (v,) = split(self.v(x), self.heads, 1)
        content = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        # As large as the other, so that it shows from outside that the two are mixed.
        position = self._scores(grid).expand_as(content).softmax(dim=-1)
        gate = self.gate.sigmoid()[:, None, None]
        rows = self.attn_drop((1 - gate) * content + gate * position)
        x = self.proj(join(rows.to(v.dtype) @ v))
        return x

    def _scores(self, grid: Size) -> Float[Tensor, "A N N"]:
        """The products v · r; a part of each follows from rows and one from columns."""
        parts = []
        for n, v in zip(grid, (self.v_position[:, 1], self.v_position[:, 0]), strict=True):
            place = torch.arange(n, device=v.device, dtype=v.dtype)
            offset = place - place[:, None]
            parts.append(v[:, None, None] * offset + self.v_position[:, 2, None, None] * offset**2)
        rows, columns = parts
        scores = rows[:, :, None, :, None] + columns[:, None, :, None, :]
        return scores.flatten(3).flatten(1, 2)
