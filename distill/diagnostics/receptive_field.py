"""Which pixels the middle of a network's features depends on.

Luo, Li, Urtasun, Zemel: Understanding the Effective Receptive Field in Deep Convolutional Neural
Networks, NeurIPS 2016, arXiv:1701.04128.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.diagnostics import UndefinedError
from distill.diagnostics.attention import centres
from distill.diagnostics.tapped import MOST, opened
from distill.models.network import Network
from distill.types import Site

MASS = 0.95  # of the gradient, whose share of the image is told
_ROUNDING = 1e-4  # of the gradient of features, below which that of their sum is noise


class Field(NamedTuple):
    """The effective receptive field of a site's middle cell."""

    site: Site
    field: Float[Tensor, "H W"]  # g, mean over images, each at a sum of 1
    radius: Float[Tensor, " N"]  # by image, in pixels: √(Σ g ‖p − c‖² / Σ g); NaN where g is 0
    relative: Float[Tensor, " N"]  # that over the radius of a g that is the same everywhere
    share: float  # of the image's pixels, as few as hold 95 % of the field


def receptive_fields(
    network: Network, images: Float[Tensor, "N 3 H W"], *, batch_size: int = 32, most: int = MOST
) -> tuple[Field, ...]:
    """The effective receptive fields of a network, site by site.

    g(p) = Σ |∂ Σ_c F_c(middle) / ∂ x(p)| over the colour channels of pixel p, where F_c are the
    features' channels. The middle cell is in row h // 2 and column w // 2, with an even number of
    them the one behind the middle; c is its centre in the image, as `centres` places it. Every
    image counts alike, however large its gradient.

    It costs one forward pass an image, and a backward pass for each site; some 50 images give a
    steady radius. A plain sum sees nothing of what a layer norm gave, but by the weights that the
    norm has learned: where one stands in front of all blocks, as in Swin and ConvNeXt, what goes
    past the blocks counts little. Sites of which a sum sees nothing at all are left out.

    Args:
        network: Any.
        images: In [0, 1], on its device.
        batch_size: Images at once; another size changes nothing but the rounding.
        most: Sites, as `distill.diagnostics.tapped.chosen` takes them.

    Returns:
        In the order they are computed, on the CPU in float64.

    Raises:
        UndefinedError: If there is no site with such a gradient.
    """
    copied, sites = opened(network, images, most=most)
    with differentiating(copied, images):
        sites = _varying(copied, sites, images[:1])
        batches = [_gradients(copied, sites, batch) for batch in torch.split(images, batch_size)]
    by_site = [torch.cat(parts).cpu() for parts in zip(*batches, strict=True)]
    found = tuple(
        _field(site, gradients)
        for site, gradients in zip(sites, by_site, strict=True)
        if bool(gradients.any())
    )
    if not found:
        raise UndefinedError("it has no grid of features whose sum depends on the image")
    return found


def radius(g: Float[Tensor, "*B H W"], centre: tuple[float, float]) -> Float[Tensor, "*B"]:
    """√(Σ g ‖p − c‖² / Σ g) in pixels; NaN where g is 0 everywhere.

    Args:
        g: Not negative, by pixel p.
        centre: c as row and column, in pixels from the middle of the first.
    """
    down, right = (
        (torch.arange(n, dtype=g.dtype, device=g.device) - at).square()
        for n, at in zip(g.shape[-2:], centre, strict=True)
    )
    moment = (g * (down[:, None] + right)).sum(dim=(-2, -1))
    return (moment / g.sum(dim=(-2, -1))).sqrt()


def share(g: Float[Tensor, "H W"], mass: float = MASS) -> float:
    """The part of all pixels that is needed to hold this part of g, the largest first."""
    held = g.flatten().sort(descending=True).values.cumsum(dim=0)
    # What is missing by rounding alone takes no pixel more.
    needed = int((held < (mass - 1e-12) * held[-1]).sum()) + 1
    return needed / g.numel()


@contextmanager
def differentiating(network: Network, images: Float[Tensor, "N 3 H W"]) -> Iterator[None]:
    """Full precision, and gradients of a network that is in eval mode.

    cuDNN's recurrent layers have none there, PyTorch's own do.
    """
    before = torch.backends.cudnn.enabled
    recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
    torch.backends.cudnn.enabled = before and not recurrent
    try:
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.enabled = before


def _field(site: Site, gradients: Float[Tensor, "N H W"]) -> Field:
    height, width = gradients.shape[-2:]
    row, column = centres(site.grid, (height, width))[_middle(site)].tolist()
    by_image = radius(gradients, (row, column))
    mass = gradients.sum(dim=(1, 2), keepdim=True)
    field = (gradients / mass).nanmean(dim=0)
    uniform = radius(torch.ones_like(field), (row, column))
    return Field(site, field, by_image, by_image / uniform, share(field))


def _middle(site: Site) -> int:
    """The middle cell, counted row by row."""
    rows, columns = site.grid
    return rows // 2 * columns + columns // 2


def _gradients(
    copied: Network, sites: tuple[Site, ...], images: Float[Tensor, "B 3 H W"]
) -> list[Float[Tensor, "B H W"]]:
    """What `receptive_fields` calls g, at each site, in float64."""
    x = images.detach().clone().requires_grad_()
    features = copied(x).features
    sums = [features[site.name].flatten(2)[..., _middle(site)].sum() for site in sites]
    last = len(sums) - 1
    found = []
    for i, total in enumerate(sums):
        (gradient,) = torch.autograd.grad(total, x, retain_graph=i < last)
        found.append(gradient.double().abs().sum(dim=1))
    return found


def _varying(
    copied: Network, sites: tuple[Site, ...], images: Float[Tensor, "B 3 H W"]
) -> tuple[Site, ...]:
    """Sites at which the sum of the channels has a gradient that is more than rounding.

    It is compared with that of a sum whose weights have none of the plain one's direction.
    """
    x = images.detach().clone().requires_grad_()
    features = copied(x).features
    found = []
    for site in sites:
        cell = features[site.name].flatten(2)[..., _middle(site)]
        weights = torch.linspace(-1, 1, cell.shape[1], device=cell.device)
        plain, other = (
            torch.autograd.grad(total, x, retain_graph=True)[0].abs().sum()
            for total in (cell.sum(), (cell * weights).sum())
        )
        if bool(plain >= _ROUNDING * other):
            found.append(site)
    return tuple(found)
