"""What a network's features know of foreground and background, cell by cell.

A linear probe as of Alain, Bengio: Understanding Intermediate Layers Using Linear Classifier
Probes, 2016, arXiv:1610.01644, on every cell of a grid.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.component import suggestion
from distill.diagnostics import UndefinedError
from distill.diagnostics.tapped import tapped
from distill.models.network import Network
from distill.objectives._align import Resample
from distill.types import Site

CELLS = 2**13  # that a probe is fitted to, at most
FEWEST = 4  # images: to fit, to choose the ridge, and to measure
# From one under which little is learned to one that hardly binds; each fit begins where the one
# before it ended.
RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)
_SEED = int.from_bytes(b"dense", "big")
_STEPS = 100  # of Newton's method, which takes about 5
_CLOSE = 1e-14  # twice the loss that is left to gain before the last step
_ROUNDING = 1e-5  # of a feature's size: a spread below is that of float32's rounding


class Dense(NamedTuple):
    """How far a probe is right on images that it was not fitted to, beside what is right anyway.

    The last four have, for each such image, the part of all its pixels that are background and of
    which that is said, and the same of foreground, in float64. `mean_iou` follows from these, of an
    image or, from their means, of all images together; their sum is the accuracy.
    """

    site: Site
    ridge: float  # that was chosen for the features
    held: Int[Tensor, " M"]  # the images that it is measured on: their positions, ascending
    said: Bool[Tensor, "M P Q"]  # foreground, as the probe sees it
    features: Float[Tensor, "M 2"]
    pixels: Float[Tensor, "M 2"]  # of the same probe on the mean colours of the cells
    background: Float[Tensor, "M 2"]  # of saying background everywhere
    foreground: Float[Tensor, "M 2"]  # of saying foreground everywhere


class _Layer(NamedTuple):
    """A linear layer on cells."""

    weight: Float[Tensor, " C"]
    bias: Float[Tensor, ""]
    ridge: float


def probe(
    network: Network,
    images: Float[Tensor, "N 3 H W"],
    masks: Bool[Tensor, "N P Q"],
    *,
    site: str | None = None,
    batch_size: int = 64,
) -> Dense:
    """Fit a linear layer to the cells of half of the images, and measure it on the other half.

    The layer gives each cell the logit of being foreground. Its target is the part of the cell that
    is foreground in the mask; its loss is that of `logistic`, on features at mean 0 and spread 1.
    The ridge is the one of `RIDGES` whose fit to three quarters of the half gives the last quarter
    the least cross-entropy; the layer is then fitted to the whole half. Logits of new images are
    scaled bilinearly to the masks, and say foreground where they are positive.

    Which images are which follows from their number alone, so that networks that are shown the same
    images are measured on the same. At most 8,192 cells are kept, equally many of each image, at
    places that are drawn once; no more images than that are fitted to. It costs one forward pass an
    image, and products of a matrix of cells by channels.

    Args:
        network: Any.
        images: In [0, 1], on its device.
        masks: True is foreground; of any resolution, showing what the images show.
        site: The module whose grid is asked; left out: the last block or stage.
        batch_size: Images at once; another size changes nothing but the rounding.

    Returns:
        On the CPU.

    Raises:
        UndefinedError: If there are fewer than 4 images, no such site or no grid of more than one
            cell, features that are not finite, or but one class in the masks of a half.
    """
    if len(images) < FEWEST:
        raise UndefinedError(f"there are fewer than {FEWEST} images with masks")
    fitted, held = (half.to(images.device) for half in _halves(len(images)))
    known = masks[held]
    for half in (masks[fitted], known):
        if bool(half.all()) or not bool(half.any()):
            raise UndefinedError(
                "the masks, or those of one half, are all foreground or all background"
            )
    copied, place = _opened(network, images, site)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        layers = _fitted(copied, place, images, masks, torch.split(fitted, batch_size))
        said: list[list[Tensor]] = [[], []]
        colours = Resample((images.shape[-2], images.shape[-1]), place.grid).to(images.device)
        for rows in torch.split(held, batch_size):
            shown = images[rows]
            grids = copied(shown).features[place.name], colours(shown)
            for column, layer, grid in zip(said, layers, grids, strict=True):
                column.append(_foreground(layer, grid, (masks.shape[-2], masks.shape[-1])))
        found, trivial = (torch.cat(column) for column in said)
        return Dense(
            site=place,
            ridge=layers[0].ridge,
            held=held.cpu(),
            said=found.cpu(),
            features=_right(found, known),
            pixels=_right(trivial, known),
            background=_right(torch.zeros_like(known), known),
            foreground=_right(torch.ones_like(known), known),
        )


def mean_iou(right: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n"]:
    """The mean over background and foreground of intersection over union.

    With b and f the parts of all pixels that are rightly said to be background and foreground, it
    is ½ (b / (1 − f) + f / (1 − b)): what is in neither union is what is rightly the other. A class
    that is neither there nor said has 1.

    Args:
        right: b and f.
    """
    other = 1 - right.flip(-1)
    whole: Tensor = torch.where(other > 0, right / other.clamp_min(1e-300), 1.0).mean(dim=-1)
    return whole


def logistic(
    x: Float[Tensor, "n C"],
    y: Float[Tensor, " n"],
    *,
    ridge: float,
    start: Float[Tensor, " C+1"] | None = None,
) -> Float[Tensor, " C+1"]:
    """The weights and the bias that minimise the cross-entropy with a ridge, exactly.

    mean over rows of softplus(z) − y z, z = x w + b, plus ridge / 2 · ‖w‖²; the bias is free. By
    Newton's method with halved steps where a whole one gains too little, in float64.

    Args:
        x: Features at about mean 0 and spread 1.
        y: Targets in [0, 1].
        ridge: Above 0: without one, separable rows have no minimum.
        start: Where to begin; left out: 0.
    """
    rows = torch.cat([x.double(), x.new_ones(len(x), 1, dtype=torch.float64)], dim=1)
    y = y.double()
    penalty = rows.new_full((rows.shape[1],), ridge)
    penalty[-1] = 0
    at = rows.new_zeros(rows.shape[1]) if start is None else start

    def loss(w: Tensor) -> Tensor:
        z = rows @ w
        return (F.softplus(z) - y * z).mean() + (penalty * w).dot(w) / 2

    for _ in range(_STEPS):
        p = (rows @ at).sigmoid()
        slope = rows.T @ (p - y) / len(y) + penalty * at
        bend = (rows.T * (p * (1 - p))) @ rows / len(y) + penalty.diag()
        step = torch.linalg.solve(bend, slope)
        gain = float(slope.dot(step))
        if gain < _CLOSE:
            break
        here, size = loss(at), 1.0
        while loss(at - size * step) > here - 1e-4 * size * gain and size > 1e-6:
            size /= 2
        at = at - size * step
    return at


def _opened(
    network: Network, images: Float[Tensor, "N 3 H W"], name: str | None
) -> tuple[Network, Site]:
    """A copy that gives the features of the site, and the site."""
    copied = tapped(network, ())
    side = network.input_size
    anatomy = copied.anatomy((side, side) if side else (images.shape[-2], images.shape[-1]))
    if name is not None and name not in anatomy.sites:
        raise UndefinedError(f"it has no grid {name!r}{suggestion(name, [*anatomy.sites])}")
    last = [site for site in anatomy.stages if math.prod(site.grid) > 1][-1:]
    sites = last if name is None else [anatomy.sites[name]]
    if not sites or math.prod(sites[0].grid) < 2:
        raise UndefinedError("it has no grid of more than one cell")
    copied.tap([sites[0].name])
    return copied, sites[0]


def _halves(count: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """Positions of the images that are fitted to, and of those that are held out, ascending."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))
    return order[: count // 2][:CELLS].sort().values, order[count // 2 :].sort().values


def _fitted(
    copied: Network,
    place: Site,
    images: Float[Tensor, "N 3 H W"],
    masks: Bool[Tensor, "N P Q"],
    batches: tuple[Int[Tensor, " b"], ...],
) -> list[_Layer]:
    """The layers on the features and on the mean colours of the cells of these images."""
    size = (images.shape[-2], images.shape[-1]), (masks.shape[-2], masks.shape[-1])
    colours, shares = (Resample(own, place.grid).to(images.device) for own in size)
    count, cells = sum(map(len, batches)), math.prod(place.grid)
    draws = torch.rand(count, cells, generator=torch.Generator().manual_seed(_SEED))
    places = draws.argsort(dim=1)[:, : CELLS // count].to(images.device)
    kept = []
    for rows, drawn in zip(batches, torch.split(places, len(batches[0])), strict=True):
        shown = images[rows]
        features = copied(shown).features[place.name].float()
        grids = [features, colours(shown), shares(masks[rows, None].float())]
        whole = torch.cat(grids, dim=1).flatten(2)
        kept.append(whole.gather(2, drawn[:, None].expand(-1, whole.shape[1], -1)).mT)
    of_features, of_colours, targets = torch.split(torch.cat(kept), [place.channels, 3, 1], dim=2)
    if not bool(of_features.isfinite().all()):
        raise UndefinedError("its features are not finite numbers")
    return [_layer(x, targets[..., 0]) for x in (of_features, of_colours)]


def _layer(cells: Float[Tensor, "N k C"], targets: Float[Tensor, "N k"]) -> _Layer:
    """The layer with the ridge that serves images best that it was not fitted to."""
    exact = cells.double()
    mean, spread = exact.mean(dim=(0, 1)), exact.std(dim=(0, 1))
    flat = spread <= _ROUNDING * exact.abs().amax(dim=(0, 1))
    scale = torch.where(flat, 0.0, 1 / torch.where(flat, 1.0, spread))
    x = (exact - mean) * scale
    known = max(1, len(x) * 3 // 4)
    losses, at = [], None
    for ridge in RIDGES:
        at = logistic(x[:known].flatten(0, 1), targets[:known].flatten(), ridge=ridge, start=at)
        z = x[known:].flatten(0, 1) @ at[:-1] + at[-1]
        losses.append(float((F.softplus(z) - targets[known:].flatten() * z).mean()))
    ridge = RIDGES[losses.index(min(losses))]
    found = logistic(x.flatten(0, 1), targets.flatten(), ridge=ridge)
    weight = found[:-1] * scale
    return _Layer(weight, found[-1] - weight.dot(mean), ridge)


def _foreground(
    layer: _Layer, grid: Float[Tensor, "B C h w"], size: tuple[int, int]
) -> Bool[Tensor, "B P Q"]:
    """Where the layer says foreground, at the masks' resolution."""
    logits = torch.einsum("bchw,c->bhw", grid.double(), layer.weight) + layer.bias
    scaled: Tensor = F.interpolate(logits[:, None], size, mode="bilinear", antialias=True)[:, 0]
    return scaled > 0


def _right(said: Bool[Tensor, "M P Q"], known: Bool[Tensor, "M P Q"]) -> Float[Tensor, "M 2"]:
    """The parts of all pixels that are rightly said to be background, and foreground."""
    both = torch.stack([~said & ~known, said & known], dim=1)
    return both.flatten(2).double().mean(dim=2).cpu()
