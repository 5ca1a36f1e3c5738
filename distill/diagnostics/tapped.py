"""A network's features, without leaving a tap in it, and which of them stand for all."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from distill.models.network import Network
from distill.models.taps import POOLED
from distill.types import Anatomy, Site

Module = TypeVar("Module", bound=nn.Module)

MOST = 12  # sites that a curve or a heat map shows
_FEW = 6  # with fewer, it is worth looking inside of them


def tapped(network: Network, names: Sequence[str]) -> Network:
    """A copy of the network that gives these features, in eval mode.

    It shares its parameters and buffers with the original, which gets no tap and keeps its mode.

    Args:
        network: Taps that it has already stay in the copy.
        names: Taps, as `distill.models.taps` describes them.

    Raises:
        IncompatibleError: If there is no such tap; the known ones are named.
    """
    copied = shared(network)
    copied.tap(names)
    return copied


def shared(module: Module) -> Module:
    """A copy of a module with the same parameters and buffers, in eval mode.

    What is done to the one's modules, mode and hooks does not happen to the other's.
    """
    same: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return forgetful(copy.deepcopy(module, same))


def forgetful(module: Module) -> Module:
    """The module in eval mode, without what its layers have kept of computing with their weights.

    Some, such as LeViT's, keep what follows from their weights alone until they train again.
    """
    return module.train().eval()


def examined(network: Network, images: Float[Tensor, "B 3 H W"]) -> tuple[Network, Anatomy]:
    """A copy of the network to tap, and what it computes of images of this size."""
    copied = tapped(network, ())
    height, width = images.shape[-2:]
    side = network.input_size
    return copied, copied.anatomy((side, side) if side else (height, width))


def opened(
    network: Network, images: Float[Tensor, "B 3 H W"], *, most: int = MOST
) -> tuple[Network, tuple[Site, ...]]:
    """A tapped copy that gives `chosen` sites, and `pooled` where there is a classifier.

    Args:
        network: Any.
        images: Of the size that it will be asked about.
        most: As `chosen` takes it.
    """
    copied, anatomy = examined(network, images)
    sites = chosen(anatomy, most)
    copied.tap([site.name for site in sites] + [POOLED] * (anatomy.width > 0))
    return copied, sites


def chosen(anatomy: Anatomy, most: int = MOST) -> tuple[Site, ...]:
    """Sites that stand for the whole network, in the order they are computed.

    They are its stages and blocks and, where these are few, numbered modules of several layers
    between them, such as a stage's residual blocks. More than `most` are thinned out evenly; the
    last stays, and so do the ends of stages.

    Args:
        anatomy: Of the network.
        most: How many sites, at least 2.
    """
    ends = {site.depth for site in anatomy.stages}
    sites = {site.depth: site for site in (*anatomy.blocks, *anatomy.stages)}
    for row in _rows(anatomy):
        if len(sites) < _FEW:
            sites = {site.depth: site for site in row} | sites
    depths = sorted(sites)
    if len(depths) > most:
        picked = {round(i * (len(depths) - 1) / (most - 1)) for i in range(most)}
        for i, depth in enumerate(depths):
            free = [other for other in picked if depths[other] not in ends]
            if depth in ends and i not in picked and free:
                picked.remove(min(free, key=lambda other: abs(other - i)))
                picked.add(i)
        depths = [depths[i] for i in sorted(picked)]
    return tuple(sites[depth] for depth in depths)


def _rows(anatomy: Anatomy) -> tuple[list[Site], list[Site]]:
    """Sites of several layers whose names end in a number, and those inside of such a one."""
    inner: dict[str, set[float]] = {}  # depths of the layers that each site holds
    for name, site in anatomy.sites.items():
        while "." in name:
            name = name.rpartition(".")[0]
            inner.setdefault(name, set()).add(site.depth)
    least = min((math.prod(site.grid) for site in anatomy.stages), default=1)
    rows: tuple[list[Site], list[Site]] = ([], [])
    for name, site in anatomy.sites.items():
        *around, own = (part[-1].isdigit() for part in name.split("."))
        several = len(inner.get(name, ())) > 1
        if own and several and sum(around) < len(rows) and math.prod(site.grid) >= least:
            rows[sum(around)].append(site)
    return rows
