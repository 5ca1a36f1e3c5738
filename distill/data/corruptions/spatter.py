"""Water and mud on the lens.

John Canny: A Computational Approach to Edge Detection, IEEE PAMI 1986.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from distill.data.corruptions import draws, filters
from distill.data.corruptions.draws import Key
from distill.data.corruptions.filters import Images

Planes = Float[Tensor, "B 1 H W"]

_WATER = (175 / 255, 238 / 255, 238 / 255)  # pale turquoise
_MUD = (63 / 255, 42 / 255, 20 / 255)  # brown
_WEAK, _STRONG = 50, 150  # gradients, of values in 0 … 255, summed by Sobel's weights
_FAR = 20  # pixels from an edge, beyond which all are as far
_LIGHT = ((-2.0, -1.0, 0.0), (-1.0, 1.0, 1.0), (0.0, 1.0, 2.0))  # from the lower right
_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
_OPAQUE = 0.8  # mud that is thinner is not seen


def spatter(
    images: Images,
    key: Key,
    mean: float,
    deviation: float,
    sigma: float,
    threshold: float,
    strength: float,
    mud: int,
) -> Images:
    """The image under drops: where blurred normal noise exceeds a threshold.

    Args:
        images: The images.
        key: Their keys.
        mean: Of the noise.
        deviation: Of the noise.
        sigma: σ in pixels by which it is blurred: the size of a drop.
        threshold: Above it there is liquid.
        strength: Of water: its greatest weight. Of mud: σ in pixels, by which its rim is softened.
        mud: 1 for mud, which covers; 0 for water, which brightens, by its relief.
    """
    noise = mean + deviation * draws.normal(key, 1, *images.shape[-2:])
    liquid = filters.gaussian(noise, sigma)
    liquid = torch.where(liquid < threshold, 0.0, liquid)
    if mud:
        cover = filters.gaussian((liquid > threshold).double(), strength)
        cover = torch.where(cover < _OPAQUE, 0.0, cover)
        return images * (1 - cover) + cover * images.new_tensor(_MUD)[:, None, None]
    depth = (liquid * 255).floor() % 256
    shine = depth * _relief(depth)
    most = shine.amax(dim=(2, 3), keepdim=True)
    shine = strength * shine / torch.where(most > 0, most, 1.0)
    return images + shine * images.new_tensor(_WATER)[:, None, None]


def _relief(depth: Planes) -> Planes:
    """How drops catch the light: the distance to the nearest edge, evenly spread and embossed."""
    distance = _distance(_edges(depth))
    levels = _equalised(_mean(distance).floor())
    lit = filters.correlate(levels, _kernel(levels, _LIGHT), border="mirror")
    return _mean(lit.round().clamp(0, 255)).round()


def _edges(depth: Planes) -> Bool[Tensor, "B 1 H W"]:
    """Canny's edges: ridges of the gradient that are strong, and what is weak and hangs together.

    Gradients are sums of absolute values. A ridge is higher than its two neighbours along the
    gradient, whose direction is rounded to a multiple of 45 degrees.
    """
    kernel = _kernel(depth, _SOBEL)
    along, down = (
        filters.correlate(depth, one, border="edge").round() for one in (kernel, kernel.mT)
    )
    height = along.abs() + down.abs()
    around = F.pad(height, (1, 1, 1, 1))

    def beside(dy: int, dx: int) -> Planes:
        rows, columns = height.shape[-2:]
        return around[..., 1 + dy : 1 + dy + rows, 1 + dx : 1 + dx + columns]

    tangent = math.tan(math.pi / 8)
    flat = down.abs() < tangent * along.abs()
    steep = down.abs() > (2 + tangent) * along.abs()  # 2 + tan 22.5° = tan 67.5°
    falling = (along * down) < 0
    ridge = torch.where(
        flat,
        (height > beside(0, -1)) & (height >= beside(0, 1)),
        torch.where(
            steep,
            (height > beside(-1, 0)) & (height >= beside(1, 0)),
            torch.where(
                falling,
                (height > beside(-1, 1)) & (height > beside(1, -1)),
                (height > beside(-1, -1)) & (height > beside(1, 1)),
            ),
        ),
    )
    weak = ridge & (height > _WEAK)
    edges, before = ridge & (height > _STRONG), torch.zeros_like(ridge)
    while not torch.equal(edges, before):
        before = edges
        edges = weak & (F.max_pool2d(edges.double(), 3, stride=1, padding=1) > 0)
    return edges


def _distance(edges: Bool[Tensor, "B 1 H W"]) -> Planes:
    """Pixels to the nearest edge, 20 at most: along the rows, then over the columns."""
    squared = torch.where(edges, 0.0, float(_FAR**2)).double()
    for dim, border in ((3, (_FAR, _FAR)), (2, (0, 0, _FAR, _FAR))):
        size = squared.shape[dim]
        wide = F.pad(squared, border, value=_FAR**2)
        for step in range(-_FAR, _FAR + 1):
            squared = squared.minimum(wide.narrow(dim, _FAR + step, size) + step**2)
    return squared.sqrt()


def _equalised(values: Planes) -> Planes:
    """Whole values up to 20, mapped to 0 … 255 in their order, so that they are spread evenly."""
    index = values.flatten(1).long()
    counts = values.new_zeros(len(values), _FAR + 1).scatter_add_(
        1, index, torch.ones_like(index, dtype=values.dtype)
    )
    reached = counts.cumsum(dim=1)
    first = counts.gather(1, (counts > 0).long().argmax(dim=1, keepdim=True))
    rest = index.shape[1] - first
    table = ((reached - first) * 255 / rest.clamp(min=1)).round()
    whole = torch.arange(_FAR + 1, dtype=values.dtype, device=values.device)
    table = torch.where(rest > 0, table, whole)  # all are the same: they stay as they are
    return table.gather(1, index).view_as(values)


def _mean(planes: Planes) -> Planes:
    """Over 3 x 3 pixels."""
    return F.avg_pool2d(filters.padded(planes, 1, "mirror"), 3, stride=1)


def _kernel(planes: Planes, values: tuple[tuple[float, ...], ...]) -> Planes:
    return planes.new_tensor(values)[None, None]
