"""Attention of every token to every token.

Vaswani et al.: Attention Is All You Need, NeurIPS 2017, arXiv:1706.03762.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.models.grids import Size

Linear = Callable[..., nn.Module]  # (d_in, d_out) and perhaps bias=False


class Attention(nn.Module):
    """softmax(Q Kᵀ / √d) V in every head, and a linear map of all heads' results."""

    def __init__(
        self, width: int, heads: int, *, linear: Linear = nn.Linear, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width, bias=qkv_bias)
        self.proj = linear(width, width)

    def forward(self, x: Float[Tensor, "B N D"], grid: Size) -> Float[Tensor, "B N D"]:
        q, k, v = split(self.qkv(x), self.heads, 3)
        x = self.proj(join(F.scaled_dot_product_attention(q, k, v)))
        return x


def split(
    x: Float[Tensor, "*B N C"], heads: int, parts: int
) -> tuple[Float[Tensor, "*B A N d"], ...]:
    """The channels of each head by themselves, for queries, keys and so on: `parts` tensors."""
    x = torch.unflatten(x, -1, (parts, heads, -1)).movedim(-3, 0)
    return x.transpose(-2, -3).unbind()


def join(x: Float[Tensor, "*B A N d"]) -> Float[Tensor, "*B N D"]:
    """All heads' channels side by side again."""
    return x.transpose(-2, -3).flatten(-2)
