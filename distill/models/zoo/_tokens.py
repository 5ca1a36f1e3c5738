"""From an image to tokens that know where they are.

Positions: sincos is Chen, Xie, He: MoCo v3, ICCV 2021, arXiv:2104.02057. Learned ones are
interpolated for images of another size as in the first ViT, arXiv:2010.11929, section 3.2. The conv
stem is Xiao et al.: Early Convolutions Help Transformers See Better, NeurIPS 2021,
arXiv:2106.14881.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
        self.grid: Size = (dials.side, dials.side)  # of the images that it is built for
        self.position = _vectors(dials.side**2, width) if dials.position == "learned" else None
        # Made anew with every network, so not part of its weights.
        waves = _sincos(self.grid, self.grid, width) if dials.position == "sincos" else None
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
            x = x + (self.position if grid == self.grid else self._interpolated(grid))
        if self.waves is not None:
            same = grid == self.grid
            x = x + (self.waves if same else _sincos(grid, self.grid, x.shape[2], x.device))
        return x, grid

    def _interpolated(self, grid: Size) -> Float[Tensor, "1 N D"]:
        """The learned positions for images of another size than they were learned with."""
        assert self.position is not None
        places = torch.unflatten(self.position.float(), 1, self.grid).permute(0, 3, 1, 2)
        places = F.interpolate(places, grid, mode="bicubic", antialias=True)
        return places.flatten(2).transpose(1, 2)


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


def _sincos(
    grid: Size, unit: Size, width: int, device: torch.device | None = None
) -> Float[Tensor, "1 N D"]:
    """Sines and cosines of a patch's row and column at width / 4 frequencies from 1 to 1/10000.

    A quarter of the channels each: sin and cos of the column, sin and cos of the row.

    Args:
        grid: Rows and columns of patches.
        unit: Of those that lie a step of 1 apart in the same image. Another grid has its patches
            between these: to count on beyond them would be to places that no network has seen.
        width: Channels of a token.
        device: Where to compute.
    """
    steps = torch.arange(width // 4, dtype=torch.float64, device=device)
    frequencies = 10000.0 ** -(steps / (width // 4))

    def along(count: int, of: int) -> Float[Tensor, "n d"]:
        place = torch.arange(count, dtype=torch.float64, device=device)
        angles = ((place + 0.5) * (of / count) - 0.5)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = (along(n, of) for n, of in zip(grid, unit, strict=True))
    columns, rows = columns.repeat(grid[0], 1), rows.repeat_interleave(grid[1], dim=0)
    return torch.cat([columns, rows], dim=1).float()[None]
