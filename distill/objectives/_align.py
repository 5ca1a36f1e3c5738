"""Features and maps of two networks brought onto one grid, and which of them belong together."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Stages, suggestion
from distill.errors import IncompatibleError
from distill.types import Anatomy, AttentionSite, Pair, Site

Grid = tuple[int, int]

# Which of a row of equal blocks stand for stages, as parts of the row.
_DEPTHS: dict[str, tuple[float, ...]] = {
    "penultimate": (1.0,),
    "last2": (5 / 6, 1.0),
    "lg": (1 / 12, 7 / 12, 1.0),  # Li et al.: Locality Guidance, ECCV 2022: blocks 1, 7, 12 of 12
    "all": (1 / 6, 1 / 3, 5 / 6, 1.0),  # Hao et al.: OFA-KD, NeurIPS 2023: blocks 2, 4, 10, 12
}
_LAST: dict[str, int] = {"penultimate": 1, "last2": 2, "lg": 3, "all": 99}
STRIDE_COST = 0.25  # of a stride twice as large, in parts of the network's depth


def match(
    pair: Pair, stages: Stages, pairs: list[list[str]] | None = None
) -> list[tuple[Site, Site]]:
    """Sites of student and teacher that belong together, in the order of depth.

    A network with stages gives the end of each, one of equal blocks those at fixed parts of its
    depth. Where one has more than the other, the cheapest choice is taken that keeps the order:
    the difference in depth, and between networks with stages also that in stride.

    Args:
        pair: The two networks.
        stages: Which stages: the last, the last two, the three of locality guidance, or all.
        pairs: Modules instead, each as [the student's, the teacher's].

    Raises:
        IncompatibleError: If one has no grid of features, or no such module.
    """
    assert pair.teacher is not None
    if pairs is not None:
        return [(_named(pair.student, own), _named(pair.teacher, other)) for own, other in pairs]
    own, other = (chosen(network, stages) for network in (pair.student, pair.teacher))
    stepped = not (pair.student.blocks or pair.teacher.blocks)
    if len(own) > len(other):
        return [(a, b) for b, a in _cheapest(other, own, stepped)]
    return _cheapest(own, other, stepped)


def attending(network: Anatomy, count: int) -> list[AttentionSite]:
    """The network's layers of attention at parts 1 and 5/6 of them, the deepest last.

    Raises:
        IncompatibleError: If it has none whose maps are understood.
    """
    sites = network.attention
    if not sites:
        raise IncompatibleError(
            f"{network.model} has no attention maps between the cells of a grid",
            hint="term guidance leads a CNN by a transformer's attention; at works for every pair",
        )
    depths = _DEPTHS["last2"][-count:]
    return [sites[index] for index in sorted({_at(depth, len(sites)) for depth in depths})]


class Resample(nn.Module):
    """Grids of features averaged onto another grid, by the exact area that cells share.

    The same as adaptive average pooling where one grid divides the other; a constant stays itself
    for any two grids. `bilinear` interpolates instead.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, source: Grid, target: Grid, *, bilinear: bool = False) -> None:
        super().__init__()
        self.target, self.same, self.bilinear = target, source == target, bilinear
        rows, columns = (
            shared(n, m) * m for n, m in zip(source, target, strict=True)
        )  # rows sum to 1
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C m n"]:
        x = x.float()
        if self.same:
            return x
        if self.bilinear:
            return nn.functional.interpolate(x, self.target, mode="bilinear")
        with torch.autocast(x.device.type, enabled=False):  # it would average in half precision
            return self.rows @ x @ self.columns.T


class ResampleMaps(nn.Module):
    """Attention maps over one grid as maps over another; every row still sums to 1.

    The new queries are averages of old ones, the mass of an old key is dealt out by area. Tokens in
    front become one: as a query their mean, as a key their sum; or are left out.
    """

    queries: Tensor
    keys: Tensor

    def __init__(self, site: AttentionSite, target: Grid, *, prefix: bool) -> None:
        super().__init__()
        self.front, self.prefix = site.prefix, prefix
        averaged = [shared(n, m) * m for n, m in zip(site.queries, target, strict=True)]
        dealt = [shared(n, m) * n for n, m in zip(site.keys, target, strict=True)]
        self.register_buffer("queries", torch.kron(*averaged), persistent=False)
        self.register_buffer("keys", torch.kron(*dealt).T, persistent=False)

    def forward(self, maps: Float[Tensor, "B A Q K"]) -> Float[Tensor, "B A M N"]:
        with torch.autocast(maps.device.type, enabled=False):  # rows would not sum to 1
            p = self.front
            grid = self.queries @ maps[..., p:, p:] @ self.keys
            if p and self.prefix:
                seen = self.queries @ maps[..., p:, :p].sum(dim=-1, keepdim=True)
                look = maps[..., :p, p:].mean(dim=-2, keepdim=True) @ self.keys
                own = maps[..., :p, :p].sum(dim=-1, keepdim=True).mean(dim=-2, keepdim=True)
                grid = torch.cat([torch.cat([own, look], -1), torch.cat([seen, grid], -1)], -2)
            return grid / grid.sum(dim=-1, keepdim=True).clamp_min(1e-8)


def shared(source: int, target: int) -> Float[Tensor, "m n"]:
    """The length that each of `target` equal parts of [0, 1] shares with each of `source`."""
    n, m = (torch.arange(count, dtype=torch.float64) / count for count in (source, target))
    begin = torch.maximum(m[:, None], n)
    end = torch.minimum(m[:, None] + 1 / target, n + 1 / source)
    return (end - begin).clamp_min(0).float()


def common(own: Grid, other: Grid, kind: Literal["min", "max"]) -> Grid:
    """The coarser or the finer of two grids, by axis."""
    pick = min if kind == "min" else max
    return pick(own[0], other[0]), pick(own[1], other[1])


def chosen(network: Anatomy, stages: Stages) -> list[Site]:
    """A network's sites at the ends of its stages, or of what stands for them.

    Raises:
        IncompatibleError: If it has no grid of features.
    """
    if network.blocks:
        indices = {_at(depth, len(network.blocks)) for depth in _DEPTHS[stages]}
        return [network.blocks[index] for index in sorted(indices)]
    if not network.stages:
        raise IncompatibleError(
            f"{network.model} has no grids of features",
            hint="terms on logits and on `pooled` work for every pair",
        )
    return list(network.stages[-_LAST[stages] :])


def _at(depth: float, count: int) -> int:
    return max(round(depth * count), 1) - 1


def _named(network: Anatomy, name: str) -> Site:
    if name not in network.sites:
        raise IncompatibleError(
            f"{network.model} has no module {name!r} that gives a grid of features"
            + suggestion(name, list(network.sites))
        )
    return network.sites[name]


def _cheapest(few: list[Site], many: list[Site], stepped: bool) -> list[tuple[Site, Site]]:
    """Each of the few with one of the many, in order, at the least cost in all."""

    def cost(a: Site, b: Site) -> float:
        stride = abs(math.log2(a.stride / b.stride)) if stepped else 0.0
        return abs(a.depth - b.depth) + STRIDE_COST * stride

    # best[j]: the cheapest way to place the sites so far, the last of them at most at many[j].
    best: list[tuple[float, list[int]]] = [(0.0, [])] * (len(many) + 1)
    for i, site in enumerate(few):
        placed: list[tuple[float, list[int]]] = [(math.inf, [])] * (len(many) + 1)
        for j in range(i, len(many)):
            total, chosen = best[j]
            here = (total + cost(site, many[j]), [*chosen, j])
            placed[j + 1] = min(placed[j], here, key=lambda way: way[0])
        best = placed
    return [(site, many[j]) for site, j in zip(few, best[-1][1], strict=True)]
