"""From an image to tokens that know where they are.

Positions: sincos is Chen, Xie, He: MoCo v3, ICCV 2021, arXiv:2104.02057. The conv stem is Xiao et
al.: Early Convolutions Help Transformers See Better, NeurIPS 2021, arXiv:2106.14881.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.models.grids import Size
from distill.models.zoo._dials import Tokens
from distill.models.zoo._gated import GatedAttention
from distill.models.zoo._layers import EPS


class Tokenised(nn.Module):
    """A network that makes tokens of an image first.

    Args:
        dials: How it does.
        norm: Whether a LayerNorm stands behind the stem.
    """

    waves: Tensor | None

    def __init__(self, dials: Tokens, *, norm: bool) -> None:
        super().__init__()
        width = dials.width
        make = _convolutions if dials.stem == "conv" else _patches
        self.stem = make(width, dials.patch_size)
        self.stem_norm = nn.LayerNorm(width, eps=EPS) if norm else None
        self.cls = _vectors(1, width) if dials.pool != "mean" else None
        self.dist = _vectors(1, width) if dials.pool == "distill" else None
        self.position = _vectors(dials.side**2, width) if dials.position == "learned" else None
        # Made anew with every network, so not part of its weights.
        waves = _sincos(dials.side, width) if dials.position == "sincos" else None
        self.register_buffer("waves", waves, persistent=False)
        self.drop = nn.Dropout(dials.drop)

    def initialise(self) -> None:
        """Xavier's uniform for every linear map, and 0.02 for what a token is born with, in place.

        The first ViT's own. DeiT's 0.02 for everything is meant for wide tokens: at a width of 48
        it leaves attention so even that training takes several times as long to begin.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, GatedAttention):
                module.localise()
        for vectors in (self.cls, self.position, self.dist):
            if vectors is not None:
                nn.init.trunc_normal_(vectors, std=0.02)

    def patches(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B N D"], Size]:
        """One token a patch, row by row, and how many rows and columns of them there are."""
        x = self.stem(images)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        if self.stem_norm is not None:
            x = self.stem_norm(x)
        if self.position is not None:
            x = x + self.position
        if self.waves is not None:
            x = x + self.waves
        return x, grid


def _vectors(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, count, width))


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
