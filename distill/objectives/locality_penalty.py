"""A ViT whose tokens look at what is near: a soft bias of convolutions.

The mean distance of attention is that of Dosovitskiy et al., ICLR 2021, arXiv:2010.11929 (appendix
D.7), squared and taken as a penalty; ConViT (d'Ascoli et al., ICML 2021, arXiv:2103.10697) calls it
non-locality.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.objectives._align import attending
from distill.objectives._term import Reads, Term
from distill.types import AttentionSite, Batch, Outputs, Pair


def locality_penalty_loss(
    maps: Float[Tensor, "B A Q K"], distances: Float[Tensor, "Q K"]
) -> Float[Tensor, " B"]:
    """Σ_k a_qk d_qk² over what it would be if every token looked at all alike.

    Args:
        maps: Rows sum to 1 over the cells of a grid.
        distances: Squared, between the cells of queries and keys.

    Returns:
        One value a sample, the mean over heads and rows: 0 where every cell looks at itself alone,
        1 where it looks at all.
    """
    uniform = distances.mean().clamp_min(1e-8)  # 0 where there is one cell
    return (maps.float() * distances).sum(dim=-1).mean(dim=(1, 2)) / uniform


class LocalityPenalty(Term):
    """Have the student's tokens look at what is near; no teacher; a usual weight is 0.1 to 1.

    The larger the weight, the shorter the distance over which a trained student's tokens look.
    """

    needs_teacher = False
    directions = "any to vit"

    def __init__(self, *, layers: Literal["last2", "all"] = "all") -> None:
        super().__init__()
        self.layers = layers

    def connect(self, pair: Pair) -> None:
        """Choose the student's layers of attention."""
        sites = attending(pair.student, 2)
        if self.layers == "all":
            sites = list(pair.student.attention)
        self.reads = Reads(tuple(site.name for site in sites))
        self.distances = nn.ModuleList(_Distances(site) for site in sites)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        losses = [
            distances(student.read(name))
            for name, distances in zip(self.reads.student, self.distances, strict=True)
        ]
        return torch.stack(losses).mean(dim=0)


class _Distances(nn.Module):
    """The loss of one layer; tokens in front have no place and are left out."""

    squared: Tensor

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        self.front = site.prefix
        places = []
        for grid in (site.queries, site.keys):
            rows, columns = ((torch.arange(n) + 0.5) / n for n in grid)
            # In parts of the image: a coarser grid of keys lies over the same image.
            places.append(torch.cartesian_prod(rows, columns))
        squared = (places[0][:, None] - places[1]).square().sum(dim=-1)
        self.register_buffer("squared", squared, persistent=False)

    def forward(self, maps: Float[Tensor, "B A Q K"]) -> Float[Tensor, " B"]:
        maps = maps[..., self.front :, self.front :]
        maps = maps / maps.sum(dim=-1, keepdim=True).clamp_min(1e-8)
        return locality_penalty_loss(maps, self.squared)
