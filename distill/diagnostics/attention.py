"""How far the heads of a network look.

The mean distance of attention is that of Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR
2021, arXiv:2010.11929 (appendix D.7); ConViT (d'Ascoli et al., ICML 2021, arXiv:2103.10697) calls
it non-locality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.diagnostics import UndefinedError
from distill.diagnostics.tapped import examined
from distill.models.grids import Size
from distill.models.network import Network
from distill.types import Anatomy, AttentionSite

_NUMBERS = 2**27  # of all maps of a batch: half a gigabyte in float32


class Locality(NamedTuple):
    """How far tokens look, mean over the cells of the grid, in float64."""

    distance: Tensor  # mean, in pixels of the image
    relative: Tensor  # that over what it is where every token looks at all cells alike
    near: Tensor  # share of the 3 x 3 cells around
    entropy: Tensor  # of where a token looks, in nats
    spread: Tensor  # that over ln n, what it is where every token looks at all n cells alike


class Layer(NamedTuple):
    """One layer of attention."""

    site: AttentionSite
    heads: Locality  # (N, A), by image and head
    uniform: Locality  # (), of tokens that look at all cells alike


class Attention(NamedTuple):
    """All layers that make maps between the cells of a grid, in the order they are computed."""

    layers: tuple[Layer, ...]
    overall: Locality  # (N,), by image: mean over the heads of a layer, then over layers


def attention(
    network: Network, images: Float[Tensor, "N 3 H W"], *, batch_size: int = 64
) -> Attention:
    """The locality of every head of every layer, by image.

    It costs one forward pass an image; some 100 images are plenty. Maps are thrown away batch by
    batch. Windows are parts of a map of the whole grid, so that they compare with global attention.

    Args:
        network: Any with attention.
        images: In [0, 1], on its device.
        batch_size: Images at once; another size changes nothing but the rounding. Fewer are taken
            where maps are large.

    Returns:
        On the CPU.

    Raises:
        UndefinedError: If no layer makes maps between the cells of a grid.
    """
    copied, anatomy = attending(network, images)
    sites = anatomy.attention
    image: Size = (images.shape[-2], images.shape[-1])
    geometry: dict[tuple[Size, Size], tuple[Tensor, Tensor]] = {}  # most layers have the same
    for grids in {(site.queries, site.keys) for site in sites}:
        tensors = distances(*grids, image), neighbours(*grids)
        geometry[grids] = (tensors[0].to(images.device), tensors[1].to(images.device))
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for batch in torch.split(images, at_once(sites, batch_size)):
            maps = copied(batch).features
            for site in sites:
                seen = locality(maps.pop(site.name), *geometry[site.queries, site.keys])
                found[site.name].append(torch.stack(seen))
    layers = []
    for site in sites:
        distance, near = geometry[site.queries, site.keys]
        alike = locality(torch.ones_like(distance)[None, None], distance, near)
        heads = torch.cat(found[site.name], dim=1).cpu()
        layers.append(Layer(site, Locality(*heads), Locality(*torch.stack(alike).cpu()[:, 0, 0])))
    means = [torch.stack(layer.heads).mean(dim=2) for layer in layers]
    return Attention(tuple(layers), Locality(*torch.stack(means).mean(dim=0)))


def locality(
    maps: Float[Tensor, "B A q k"], distance: Float[Tensor, "Q K"], near: Bool[Tensor, "Q K"]
) -> Locality:
    """How far each head looks, as means over the Q cells that look.

    distance: Σ_k a_qk d_qk; near: Σ a_qk over the keys that are near; entropy: −Σ_k a_qk ln a_qk.
    Tokens in front of the cells are left out and rows divided by what is left of them. A cell that
    looks at nothing but those tokens counts in no mean.

    Args:
        maps: Not negative; of the tokens in front, if there are, and the cells.
        distance: Between the cells of queries and keys, as `distances` gives them.
        near: Whether they are neighbours, as `neighbours` says.

    Returns:
        Each (B, A).
    """
    keys = distance.shape[1]
    cells = between(maps, *distance.shape)
    far = (cells * distance).sum(dim=-1).nanmean(dim=-1)
    close = (cells * near).sum(dim=-1).nanmean(dim=-1)
    entropy = torch.special.entr(cells).sum(dim=-1).nanmean(dim=-1)
    return Locality(far, far / distance.mean(), close, entropy, entropy / math.log(keys))


def between(maps: Float[Tensor, "B A q k"], queries: int, keys: int) -> Float[Tensor, "B A Q K"]:
    """The maps without the tokens in front of the cells, their rows adding up to 1 again.

    In float64; NaN in the row of a cell that looks at nothing but those tokens.
    """
    cells = maps[..., -queries:, -keys:].double()
    rows: Tensor = cells / cells.sum(dim=-1, keepdim=True)
    return rows


def distances(queries: Size, keys: Size, image: Size) -> Float[Tensor, "Q K"]:
    """Pixels from the centre of each cell that looks to that of each that is looked at.

    Args:
        queries: Rows and columns of the grid of those that look.
        keys: Likewise of those that are looked at; both grids lie over the whole image.
        image: Rows and columns in pixels.
    """
    return torch.cdist(
        centres(queries, image), centres(keys, image), compute_mode="donot_use_mm_for_euclid_dist"
    )


def neighbours(queries: Size, keys: Size) -> Bool[Tensor, "Q K"]:
    """Whether a key is one of the 3 x 3 cells around a query.

    Where one grid is coarser, they are 3 x 3 of its cells: by row and by column the centres are
    less than 1.5 of the larger cells apart.
    """
    near = []
    for n, m in zip(queries, keys, strict=True):
        # Between the centres (2i + 1) / 2n and (2j + 1) / 2m; in whole numbers, so that it is exact
        gap = (2 * torch.arange(n)[:, None] + 1) * m - (2 * torch.arange(m) + 1) * n
        near.append(gap.abs() < 3 * max(n, m))
    rows, columns = near
    both: Tensor = rows[:, None, :, None] & columns[None, :, None, :]
    return both.flatten(2).flatten(0, 1)


def centres(grid: Size, image: Size) -> Float[Tensor, "n 2"]:
    """Row and column of the centre of each cell, in pixels from the middle of the first pixel.

    (i + ½) H / h − ½: a grid lies over the whole image.
    """
    rows, columns = (
        (torch.arange(n, dtype=torch.float64) + 0.5) * pixels / n - 0.5
        for n, pixels in zip(grid, image, strict=True)
    )
    return torch.cartesian_prod(rows, columns)


def attending(network: Network, images: Float[Tensor, "N 3 H W"]) -> tuple[Network, Anatomy]:
    """A copy of the network that gives all its maps of such images, and what it is made of.

    Raises:
        UndefinedError: If no layer makes maps between the cells of a grid.
    """
    copied, anatomy = examined(network, images)
    if not anatomy.attention:
        raise UndefinedError("it has no attention maps between the cells of a grid")
    copied.tap([site.name for site in anatomy.attention])
    return copied, anatomy


def at_once(sites: Sequence[AttentionSite], most: int) -> int:
    """How many images' maps are held at once: up to `most`, fewer where they are large."""
    numbers = sum(
        site.heads * math.prod(site.prefix + math.prod(grid) for grid in (site.queries, site.keys))
        for site in sites
    )
    return max(1, min(most, _NUMBERS // max(1, numbers)))
