"""The blocks of a vision transformer, of every kind that its dials can name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from distill.models.grids import Size
from distill.models.zoo._attention import Attention, Linear
from distill.models.zoo._crate import CrateBlock
from distill.models.zoo._dials import Blocks
from distill.models.zoo._dynamic_conv import DynamicConv
from distill.models.zoo._gated import GatedAttention
from distill.models.zoo._layers import EPS, DropPath, LayerScale
from distill.models.zoo._linear import linear
from distill.models.zoo._windows import WindowAttention


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)).

    `attention` is whatever mixes tokens: it takes them and the shape of their grid.
    """

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        *,
        hidden: int,
        linear: Linear,
        layer_scale: float,
        drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(
            linear(width, hidden), nn.GELU(), nn.Dropout(drop), linear(hidden, width)
        )
        self.scale1, self.scale2 = (
            LayerScale(width, layer_scale) if layer_scale else nn.Identity() for _ in range(2)
        )
        self.drop = nn.Sequential(nn.Dropout(drop), DropPath(drop_path))

    def forward(self, x: Float[Tensor, "B N D"], grid: Size) -> Float[Tensor, "B N D"]:
        x = x + self.drop(self.scale1(self.attention(self.norm1(x), grid)))
        x = x + self.drop(self.scale2(self.mlp(self.norm2(x))))
        return x


def row(
    dials: Blocks, width: int, heads: int, grid: Size, *, rates: Sequence[float], gated: int = 0
) -> nn.ModuleList:
    """Blocks one behind another.

    Args:
        dials: What the blocks are made of.
        width: Channels of a token.
        heads: Attention heads.
        grid: Rows and columns of the tokens.
        rates: The probability of skipping a branch, for each block.
        gated: How many blocks, the first, have gated attention.
    """
    return nn.ModuleList(
        _block(dials, width, heads, grid, rate=rate, shifted=i % 2 == 1, gated=i < gated)
        for i, rate in enumerate(rates)
    )


def _block(
    dials: Blocks, width: int, heads: int, grid: Size, *, rate: float, shifted: bool, gated: bool
) -> nn.Module:
    if dials.mixer == "crate":
        return CrateBlock(width, heads, drop=dials.drop, drop_path=rate)
    maps: Linear = partial(linear, structure=dials.linear, rank=dials.rank)
    attention: nn.Module
    if dials.mixer == "dynamic_conv":
        attention = DynamicConv(width, linear=maps)
    elif dials.attention == "window":
        attention = WindowAttention(
            width, heads, grid=grid, window=dials.window, shifted=shifted, linear=maps
        )
    elif gated:
        attention = GatedAttention(width, heads)
    else:  # ConViT's maps to queries, keys and values have no bias, and ViT's have one
        bias = dials.attention != "gated"
        attention = Attention(width, heads, linear=maps, qkv_bias=bias)
    return Block(
        width,
        attention,
        hidden=dials.hidden(width),
        linear=maps,
        layer_scale=dials.layer_scale,
        drop=dials.drop,
        drop_path=rate,
    )
