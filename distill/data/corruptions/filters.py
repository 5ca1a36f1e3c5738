"""Blurring, correlating and moving batches of images, with the borders of the published recipes.

All is in float64: what differs in the last bits, by device or by the size of a batch, is far below
the half of a level to which a result is rounded.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "B 3 H W"]  # in [0, 1], in float64

# What lies beyond a row a b c d: "edge" … a a|a b c d|d d …, "mirror" … c b|a b c d|c b …,
# "reflect" … b a|a b c d|d c …
Border = Literal["edge", "mirror", "reflect"]


def gaussian(
    planes: Float[Tensor, "... H W"],
    sigma: float,
    *,
    border: Border = "edge",
    truncate: float = 4.0,
) -> Float[Tensor, "... H W"]:
    """Rows and columns correlated with exp(−x² / 2σ²), |x| ≤ truncate · σ, normalised to sum 1.

    As two products of matrices, in which the border is folded into the weights: any σ costs the
    same, and may be wider than the image.

    Args:
        planes: In float64.
        sigma: σ in pixels; below 1/8 nothing changes, since no neighbour is in reach.
        border: What is beyond the planes.
        truncate: The kernel's radius is truncate · σ pixels, rounded.
    """
    rows, columns = (
        _weights(n, sigma, border, truncate).to(planes.device) for n in planes.shape[-2:]
    )
    return along(planes, rows, columns)


def along(
    planes: Float[Tensor, "... H W"], rows: Float[Tensor, "h H"], columns: Float[Tensor, "w W"]
) -> Float[Tensor, "... h w"]:
    """Every column of the planes times `rows`, then every row times `columns`."""
    return rows @ planes @ columns.T


@functools.lru_cache(maxsize=32)
def _weights(size: int, sigma: float, border: Border, truncate: float) -> Float[Tensor, "n n"]:
    radius = int(truncate * sigma + 0.5)
    steps = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (steps / sigma) ** 2) if radius else np.ones(1)
    weights = np.zeros((size, size))
    places = np.arange(size)[:, None] + steps
    np.add.at(weights, (np.arange(size)[:, None], inside(places, size, border)), kernel)
    return torch.from_numpy(weights / kernel.sum())


def inside(places: Int[np.ndarray, "..."], size: int, border: Border) -> Int[np.ndarray, "..."]:
    """Which pixel of `size` in a row stands at any place, far beyond the row too."""
    if border == "edge":
        found: np.ndarray = np.clip(places, 0, size - 1)
        return found
    twice = 1 if border == "reflect" else 0  # whether the outermost pixel comes twice
    period = 2 * (size - 1 + twice)
    found = np.minimum(places % period, (-twice - places) % period)
    return found


def correlate(
    planes: Float[Tensor, "B C H W"], kernels: Float[Tensor, "b 1 k k"], *, border: Border
) -> Float[Tensor, "B C H W"]:
    """out(y, x) = Σ kernel(r + i, r + j) · plane(y + i, x + j) over |i|, |j| ≤ r, k = 2r + 1.

    By Fourier transforms: every image may have a kernel of its own, of any size.

    Args:
        planes: In float64.
        kernels: One for all images, or one for each.
        border: What is beyond the planes.
    """
    height, width = planes.shape[-2:]
    wide = padded(planes, kernels.shape[-1] // 2, border)
    size = [
        -(-n // 8) * 8 for n in wide.shape[-2:]
    ]  # a prime length would take several times longer
    spectrum = torch.fft.rfft2(wide, s=size) * torch.fft.rfft2(kernels, s=size).conj()
    whole: Tensor = torch.fft.irfft2(spectrum, s=size)
    return whole[..., :height, :width]


def padded(
    planes: Float[Tensor, "... H W"], radius: int, border: Border
) -> Float[Tensor, "... h w"]:
    """The planes with `radius` pixels more on every side."""
    rows, columns = (
        torch.from_numpy(inside(np.arange(-radius, n + radius), n, border)).to(planes.device)
        for n in planes.shape[-2:]
    )
    return planes.index_select(-2, rows).index_select(-1, columns)


def warp(
    images: Float[Tensor, "B C H W"],
    y: Float[Tensor, "B H W"],
    x: Float[Tensor, "B H W"],
    *,
    border: Border,
) -> Float[Tensor, "B C H W"]:
    """The images at the rows `y` and columns `x` of each, linear between four pixels.

    Args:
        images: In float64.
        y: In pixels from the middle of the first row.
        x: In pixels from the middle of the first column.
        border: What is beyond the images.
    """
    height, width = images.shape[-2:]
    centred = border == "mirror"  # grid_sample's way to say whether it turns at pixels' middles
    if centred:
        grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    else:
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    mode = "border" if border == "edge" else "reflection"
    return F.grid_sample(images, grid, padding_mode=mode, align_corners=centred)


def positions(images: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "H 1"], Float[Tensor, " W"]]:
    """The row and the column of every pixel."""
    height, width = images.shape[-2:]
    places = torch.arange(max(height, width), dtype=torch.float64, device=images.device)
    return places[:height, None], places[:width]


def motion(
    planes: Float[Tensor, "B C H W"], angle: Float[Tensor, " B"], radius: int, sigma: float
) -> Float[Tensor, "B C H W"]:
    """Each image smeared into one direction, the far end fading.

    Σ_i w_i · image(y + ⌈i sin a − ½⌉, x + ⌈i cos a − ½⌉) for i = 0 … 2 · radius, w_i proportional
    to exp(−i² / 2σ²): the motion blur of ImageMagick, with which the published sets were made.

    Args:
        planes: In float64.
        angle: a of each image, in degrees.
        radius: Half of the path's length, in pixels.
        sigma: σ in pixels.
    """
    steps = torch.arange(2 * radius + 1, dtype=torch.float64, device=planes.device)
    weights = (-0.5 * (steps / sigma) ** 2).exp()
    turned = angle[:, None] * (math.pi / 180)
    down = (steps * turned.sin() - 0.5).ceil().long() + 2 * radius
    right = (steps * turned.cos() - 0.5).ceil().long() + 2 * radius
    size = 4 * radius + 1
    kernels = planes.new_zeros(len(planes), size * size)
    kernels.scatter_add_(1, down * size + right, (weights / weights.sum()).expand(down.shape))
    return correlate(planes, kernels.view(-1, 1, size, size), border="edge")
