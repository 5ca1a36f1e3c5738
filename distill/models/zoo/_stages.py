"""A vision transformer in stages: from one to the next four patches become one, twice as wide.

Liu et al.: Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021,
arXiv:2103.14030. With conv positions there is a position encoding generator in every stage: Chu et
al.: Twins, NeurIPS 2021, arXiv:2104.13840.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.models.grids import Size
from distill.models.zoo._block import row
from distill.models.zoo._dials import Blocks, Tokens
from distill.models.zoo._layers import EPS, LocalPosition
from distill.models.zoo._tokens import Tokenised


class Pyramid(Tokenised):
    """Stages of blocks, and a classifier of the mean token.

    Heads double with the width, so that a head has as many channels in every stage. As in Swin, a
    LayerNorm stands behind the stem.
    """

    def __init__(self, num_classes: int, depths: list[int], tokens: Tokens, blocks: Blocks) -> None:
        super().__init__(tokens, norm=True)
        rates = blocks.rates(sum(depths))
        local = tokens.position == "conv"
        self.stages = nn.ModuleList()
        width, heads, side = tokens.width, blocks.heads, tokens.side
        for i, depth in enumerate(depths):
            first = sum(depths[:i])
            if i:
                width, heads, side = 2 * width, 2 * heads, -(-side // 2)
            part = rates[first : first + depth]
            self.stages.append(
                _Stage(blocks, width, heads, (side, side), merge=i > 0, rates=part, local=local)
            )
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = nn.Linear(width, num_classes)
        self.initialise()

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        """Logits."""
        x, grid = self.patches(images)
        x = self.drop(x)
        for stage in self.stages:
            x, grid = stage(x, grid)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits


class _Stage(nn.Module):
    def __init__(
        self,
        dials: Blocks,
        width: int,
        heads: int,
        grid: Size,
        *,
        merge: bool,
        rates: Sequence[float],
        local: bool,
    ) -> None:
        super().__init__()
        self.merge = PatchMerging(width // 2) if merge else None
        self.local = LocalPosition(width) if local else None
        self.blocks = row(dials, width, heads, grid, rates=rates)

    def forward(self, x: Float[Tensor, "B N D"], grid: Size) -> tuple[Float[Tensor, "B n d"], Size]:
        if self.merge is not None:
            x, grid = self.merge(x, grid)
        for i, block in enumerate(self.blocks):
            x = block(x, grid)
            if i == 0 and self.local is not None:
                x = self.local(x, grid)
        return x, grid


class PatchMerging(nn.Module):
    """A linear map of 2 x 2 neighbours to one token of twice the width.

    A grid with an odd side is padded by zeros.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=EPS)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Float[Tensor, "B N D"], grid: Size) -> tuple[Float[Tensor, "B n d"], Size]:
        x = F.pad(torch.unflatten(x, 1, grid), (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
        merged = (x.shape[1], x.shape[2])
        return self.reduction(self.norm(x.flatten(1, 2))), merged
