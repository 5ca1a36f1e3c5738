"""A plain vision transformer whose inductive biases are dials.

Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929. Positions: sincos is
Chen, Xie, He: MoCo v3, ICCV 2021, arXiv:2104.02057; conv is the position encoding generator of Chu
et al.: CPVT, ICLR 2023, arXiv:2102.10882. The conv stem is Xiao et al.: Early Convolutions Help
Transformers See Better, NeurIPS 2021, arXiv:2106.14881. The default size is that of Lee, Lee, Song:
Vision Transformer for Small-Size Datasets, 2021, arXiv:2112.13492.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Count, Fraction, Positive
from distill.errors import IncompatibleError, RecipeError


def vit(
    num_classes: int,
    image_size: int,
    *,
    width: Count = 192,
    depth: Count = 9,
    heads: Count = 12,
    mlp_ratio: Positive = 2.0,
    patch_size: Count = 4,
    position: Literal["learned", "sincos", "conv", "none"] = "learned",
    pool: Literal["mean", "cls"] = "mean",
    stem: Literal["patch", "conv"] = "patch",
    drop: Fraction = 0.0,
    drop_path: Fraction = 0.0,
) -> nn.Module:
    """A plain vision transformer; patch, stem, position and pooling are dials.

    Args:
        num_classes: Logits a sample.
        image_size: Side of the images in pixels.
        width: Channels of a token.
        depth: Blocks.
        heads: Attention heads; they divide the width.
        mlp_ratio: Hidden channels of a block's MLP over the width.
        patch_size: Side of a patch in pixels; 1 makes every pixel a token.
        position: What tells a token where it is: a learned vector, fixed sines and cosines, a 3 x 3
            depthwise convolution behind the first block, or nothing.
        pool: What the classifier reads: the mean of all patches, or a token of its own.
        stem: How pixels become tokens: one linear map a patch, or overlapping 3 x 3 convolutions.
        drop: Dropout of tokens and of each branch, a probability.
        drop_path: Probability of skipping a branch in the last block; it grows linearly from 0 in
            the first.

    Raises:
        IncompatibleError: If patches do not tile the image.
        RecipeError: If the dials contradict one another.
    """
    if image_size % patch_size:
        sizes = [p for p in range(1, image_size + 1) if image_size % p == 0]
        raise IncompatibleError(
            f"vit: patches of {patch_size} px do not tile an image of {image_size} px",
            hint=f"set patch_size to one of {', '.join(map(str, sizes))}",
        )
    if width % heads:
        raise RecipeError(f"vit: heads must divide the width, got {heads} heads and width {width}")
    if position == "sincos" and width % 4:
        raise RecipeError(f"vit: position sincos needs a width divisible by 4, got {width}")
    if stem == "conv" and patch_size & (patch_size - 1):
        raise RecipeError(
            f"vit: stem conv halves the image and needs a patch_size of 1, 2, 4, 8, ..., "
            f"got {patch_size}"
        )
    if drop_path == 1:
        raise RecipeError("vit: drop_path must be below 1, or the last block is never trained")
    return _ViT(
        num_classes,
        grid=image_size // patch_size,
        width=width,
        depth=depth,
        heads=heads,
        hidden=round(width * mlp_ratio),
        patch_size=patch_size,
        position=position,
        pool=pool,
        stem=stem,
        drop=drop,
        drop_path=drop_path,
    )


class _ViT(nn.Module):
    waves: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        grid: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        patch_size: int,
        position: str,
        pool: str,
        stem: str,
        drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.stem = (
            _convolutions(width, patch_size) if stem == "conv" else _patches(width, patch_size)
        )
        self.cls = nn.Parameter(torch.empty(1, 1, width)) if pool == "cls" else None
        self.position = (
            nn.Parameter(torch.empty(1, grid**2, width)) if position == "learned" else None
        )
        # Made anew with every network, so not part of its weights.
        waves = _sincos(grid, width) if position == "sincos" else None
        self.register_buffer("waves", waves, persistent=False)
        self.local = _LocalPosition(width) if position == "conv" else None
        self.drop = nn.Dropout(drop)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(_Block(width, heads, hidden, drop, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier's uniform for every linear map, and 0.02 for what a token is born with.

        The paper's own. DeiT's 0.02 for everything is meant for wide tokens: at a width of 48 it
        leaves attention so even that training takes several times as long to begin.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for vector in (self.cls, self.position):
            if vector is not None:
                nn.init.trunc_normal_(vector, std=0.02)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        x = self.stem(x)
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        if self.position is not None:
            x = x + self.position
        if self.waves is not None:
            x = x + self.waves
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 0 and self.local is not None:
                x = self.local(x, grid)
        x = self.norm(x)
        logits: Tensor = self.head(x.mean(dim=1) if self.cls is None else x[:, 0])
        return logits


class _Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int, drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(drop), nn.Linear(hidden, width)
        )
        self.drop = nn.Sequential(nn.Dropout(drop), _DropPath(drop_path))

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        x = x + self.drop(self.attention(self.norm1(x)))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return x


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y: Tensor = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(y.transpose(1, 2).flatten(2))
        return y


class _LocalPosition(nn.Module):
    """x + depthwise 3 x 3 convolution on the patch grid; the zero border tells where a patch is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Float[Tensor, "B N D"], grid: torch.Size) -> Float[Tensor, "B N D"]:
        prefix = x.shape[1] - grid.numel()  # tokens that have no place in the image
        patches = x[:, prefix:]
        near = torch.unflatten(patches.transpose(1, 2), 2, grid)
        near = self.conv(near).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :prefix], patches + near], dim=1)


class _DropPath(nn.Module):
    """Skip a branch for whole samples, and scale the rest so that the mean stays."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


def _patches(width: int, patch_size: int) -> nn.Module:
    """One linear map of the pixels of each patch."""
    return nn.Conv2d(3, width, patch_size, stride=patch_size)


def _convolutions(width: int, patch_size: int) -> nn.Module:
    """3 x 3 convolutions that double the channels and halve the grid, then a linear map."""
    strides = [2] * (patch_size.bit_length() - 1) or [1]
    layers: list[nn.Module] = []
    channels = 3
    for i, stride in enumerate(strides):
        out = max(width >> (len(strides) - 1 - i), 1)
        conv = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(out), nn.GELU()]
        channels = out
    return nn.Sequential(*layers, nn.Conv2d(channels, width, 1))


def _sincos(grid: int, width: int) -> Float[Tensor, "1 N D"]:
    """Sines and cosines of a patch's row and column at width / 4 frequencies from 1 to 1/10000.

    A quarter of the channels each: sin and cos of the column, sin and cos of the row.
    """
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = waves.repeat(grid, 1), waves.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float()[None]
