"""A residual network whose stages end in local attention.

Park, Kim: How Do Vision Transformers Work?, ICLR 2022, arXiv:2202.06709. Attention averages what
convolutions transform, so it stands behind them, at the end of a stage. The residual network is
that of He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks, ECCV 2016,
arXiv:1603.05027.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Count
from distill.models.grids import Size
from distill.models.zoo._attention import join, split
from distill.models.zoo._init import he_normal
from distill.models.zoo._preactivation import PreactivationBlock
from distill.models.zoo._windows import collect, deal, reachable, relative

_CHANNELS = (64, 128, 256, 512)
# Whether a stage's last block attends. The paper replaces convolutions from the end of the network
# on; where one more does not help, at the end of the stage before. The first keeps all of its own.
_ATTENTION = (False, True, True, True)
_HEADS = (3, 6, 12, 24)
_HEAD_WIDTH = 64  # channels; all heads together are wider than the features


class _WindowAttention(nn.Module):
    """softmax(Q Kᵀ / √d + bias) V in each window; all heads share a bias a relative position.

    A grid that windows do not tile is padded at its right and lower border, and no cell attends to
    the padding. A grid that is not larger than a window is one window.

    Attributes:
        window_size: Rows and columns of a window.
        shift_size: By how much the grid is rolled: never.
    """

    index: Tensor
    mask: Tensor | None

    def __init__(self, channels: int, heads: int, *, grid: Size, window: int) -> None:
        super().__init__()
        self.heads, self.grid = heads, grid
        self.window_size = (min(window, grid[0]), min(window, grid[1]))
        self.shift_size = (0, 0)
        rows, columns = self.window_size
        self.bias_table = nn.Parameter(torch.empty((2 * rows - 1) * (2 * columns - 1)))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.qkv = nn.Linear(channels, 3 * heads * _HEAD_WIDTH, bias=False)
        self.proj = nn.Linear(heads * _HEAD_WIDTH, channels)
        # Made anew with every network, so not part of its weights.
        self.register_buffer("index", relative(self.window_size), persistent=False)
        mask = reachable(grid, self.window_size, self.shift_size)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        samples, _, height, width = x.shape
        mask = self.mask
        if (height, width) != self.grid:
            mask = reachable((height, width), self.window_size, self.shift_size)
        down, right = (-n % side for n, side in zip((height, width), self.window_size, strict=True))
        x = F.pad(x, (0, right, 0, down)).movedim(1, -1)
        cells = deal(x, self.window_size)
        q, k, v = split(self.qkv(cells.flatten(0, 1)), self.heads, 3)
        bias = self.bias_table[self.index]
        if mask is not None:
            bias = torch.where(mask.to(x.device), bias, float("-inf")).repeat(samples, 1, 1, 1)
        y = self.proj(join(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))
        y = torch.unflatten(y, 0, cells.shape[:2])
        y = collect(y, self.window_size, (height + down, width + right))
        return y[:, :height, :width].movedim(-1, 1)


class _Attention(nn.Module):
    """x + attention(norm(conv(GELU(norm(x))))), the convolution 1 x 1: pre-activation."""

    def __init__(self, channels: int, heads: int, *, grid: Size, window: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.attention = _WindowAttention(channels, heads, grid=grid, window=window)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        y: Tensor = self.attention(self.norm2(self.conv(F.gelu(self.norm1(x)))))
        return x + y


class _AlterNet(nn.Module):
    """Four stages of two blocks each.

    Convolutions begin as He's normal, whose scale survives ReLUs; attention's maps, behind which
    there is none, by Xavier's uniform; biases of relative positions as a truncated normal of 0.02.
    """

    def __init__(self, num_classes: int, image_size: int, *, window: int) -> None:
        super().__init__()
        self.stem, stride = _stem(image_size)
        side, channels = -(-image_size // stride), _CHANNELS[0]
        self.stages = nn.ModuleList()
        for i, attends in enumerate(_ATTENTION):
            first = PreactivationBlock(channels, _CHANNELS[i], 2 if i else 1)
            side, channels = -(-side // (2 if i else 1)), _CHANNELS[i]
            second = (
                _Attention(channels, _HEADS[i], grid=(side, side), window=window)
                if attends
                else PreactivationBlock(channels, channels, 1)
            )
            self.stages.append(nn.Sequential(first, second))
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        he_normal(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(F.relu(self.norm(x)).mean(dim=(2, 3)))
        return logits


def _stem(image_size: int) -> tuple[nn.Module, int]:
    """The layers in front of the first stage, and by how much they shrink the image."""
    if image_size < 64:
        return nn.Conv2d(3, _CHANNELS[0], 3, padding=1, bias=False), 1
    wide = nn.Conv2d(3, _CHANNELS[0], 7, stride=2, padding=3, bias=False)
    return nn.Sequential(wide, nn.MaxPool2d(3, stride=2, padding=1)), 4


def alternet_18(num_classes: int, image_size: int, *, window: Count | None = None) -> nn.Module:
    """AlterNet-18: 9.50 M parameters at 32 px and 100 classes.

    Images of 64 px or more go through ImageNet's stem of stride 4.

    Args:
        num_classes: Logits a sample.
        image_size: Side of the images in pixels.
        window: Cells along a side of a window; left out: 7 from 224 px on, as in the paper, and 4
            below. In a grid that is no larger, every cell attends to all.
    """
    usual = 7 if image_size >= 224 else 4
    return _AlterNet(num_classes, image_size, window=window or usual)
