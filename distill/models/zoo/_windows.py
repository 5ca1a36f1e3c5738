"""Attention inside of windows, every second time of windows that lie half a window further.

Liu et al.: Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021,
arXiv:2103.14030.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.models.grids import Size
from distill.models.zoo._attention import Linear, join, split


class WindowAttention(nn.Module):
    """softmax(Q Kᵀ / √d + bias) V in each window; the bias is learned for every relative position.

    A grid that windows do not tile is padded at its right and lower border, and no token attends to
    the padding. Shifted windows are those of the grid rolled up and left; no token attends across
    the border that is rolled inside. A grid that is not larger than a window is one window.

    Attributes:
        window_size: Rows and columns of a window.
        shift_size: By how much the grid is rolled.
    """

    index: Tensor
    mask: Tensor | None

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        grid: Size,
        window: int,
        shifted: bool,
        linear: Linear = nn.Linear,
    ) -> None:
        super().__init__()
        self.heads, self.grid = heads, grid
        self.window_size = (min(window, grid[0]), min(window, grid[1]))
        half = (window // 2 if shifted else 0,) * 2
        self.shift_size = _where_larger(grid, self.window_size, half)
        rows, columns = self.window_size
        self.bias_table = nn.Parameter(torch.empty((2 * rows - 1) * (2 * columns - 1), heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.qkv = linear(width, 3 * width)
        self.proj = linear(width, width)
        # Made anew with every network, so not part of its weights.
        self.register_buffer("index", relative(self.window_size), persistent=False)
        mask = reachable(grid, self.window_size, self.shift_size)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Float[Tensor, "B N D"], grid: Size) -> Float[Tensor, "B N D"]:
        shift = _where_larger(grid, self.window_size, self.shift_size)
        mask = self.mask
        if grid != self.grid:
            mask = reachable(grid, self.window_size, shift)
        x = torch.unflatten(x, 1, grid)
        down, right = (-n % side for n, side in zip(grid, self.window_size, strict=True))
        x = F.pad(x, (0, 0, 0, right, 0, down))
        padded = (grid[0] + down, grid[1] + right)
        x = deal(x.roll((-shift[0], -shift[1]), (1, 2)), self.window_size)
        q, k, v = split(self.qkv(x), self.heads, 3)
        bias = self.bias_table[self.index].movedim(-1, 0)
        if mask is not None:
            bias = torch.where(mask.to(x.device), bias, float("-inf"))
        x = self.proj(join(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))
        x = collect(x, self.window_size, padded).roll(shift, (1, 2))
        return x[:, : grid[0], : grid[1]].flatten(1, 2)


def _where_larger(grid: Size, window: Size, shift: Size) -> Size:
    """The shift, and none along a side that holds but one window."""
    rows, columns = (s if n > m else 0 for n, m, s in zip(grid, window, shift, strict=True))
    return rows, columns


def deal(x: Float[Tensor, "B H W D"], window: Size) -> Float[Tensor, "B windows n D"]:
    """The cells of each window by themselves, windows row by row."""
    x = torch.unflatten(torch.unflatten(x, 2, (-1, window[1])), 1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def collect(
    x: Float[Tensor, "B windows n D"], window: Size, grid: Size
) -> Float[Tensor, "B H W D"]:
    """The grid of which these are the windows."""
    x = torch.unflatten(x, 1, (grid[0] // window[0], grid[1] // window[1]))
    return torch.unflatten(x, 3, window).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def relative(window: Size) -> Int[Tensor, "n n"]:
    """Which row of the bias table holds the offset from a window's key to its query."""
    rows, columns = window
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    down = row[:, None] - row + rows - 1
    right = column[:, None] - column + columns - 1
    return down * (2 * columns - 1) + right


def reachable(grid: Size, window: Size, shift: Size) -> Bool[Tensor, "windows 1 n n"] | None:
    """Which keys a query may attend to; None: to all of its window.

    Cells of a window are told apart by whether they were rolled in from above, from the left, or
    are padding. Padding attends to padding, so that no row is empty.
    """
    padded = [n + -n % side for n, side in zip(grid, window, strict=True)]
    if not any(shift) and padded == [*grid]:
        return None
    kinds = []
    for n, cells, s in zip(grid, padded, shift, strict=True):
        place = torch.arange(cells) + s
        kinds.append((place >= cells, place % cells >= n))
    (above, below), (left, beyond) = kinds
    kind = above[:, None] + 2 * left
    kind = torch.where(below[:, None] | beyond, 4, kind)
    kind = deal(kind[None, :, :, None], window)[0]
    return (kind == kind.transpose(1, 2))[:, None]
