"""Foreground masks of images: those that a user drew, or what stands out from a plain background.

Otsu: A Threshold Selection Method from Gray-Level Histograms, 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from distill.data import images as files
from distill.data.images import BadImageError
from distill.errors import PreflightError

# Otsu's measure of how well a threshold parts an image, in the median image. A normal distribution
# of levels has 0.64, a uniform one 0.75; Fashion-MNIST 0.92, digits 0.87, parts of photographs 0.72
# to 0.86.
SEPARABLE = 0.8
# Part of the border that is on one side of it, likewise. Fashion-MNIST has 0.94, digits 0.82, parts
# of photographs 0.6; of one of a flower before a dark wall 0.83.
PLAIN = 0.75
_LEVELS = 256
_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601
_MIDDLE = 127  # the lightest gray that is background
_LISTED = 10  # bad files that an error names


def load(
    folder: Path,
    names: Sequence[str],
    *,
    size: int,
    crop: float,
    max_pixels: int,
    images: Path | None = None,
) -> Bool[Tensor, "N S S"]:
    """The masks of some images, cut and scaled as the images themselves are for an evaluation.

    The mask of `cat/1.jpg` is `cat/1.png`. In one with a palette, all but the first entry is
    foreground; in a gray one what is lighter than 127, or all but 0 where there are but 0 and 1; in
    one of colours the largest of the three counts as the gray. One with more dark gray than light
    is refused: its grays are rather the numbers of classes. A pixel of the result is foreground
    where at least half of what it shows is.

    Args:
        folder: Where the masks are.
        names: Of the images, relative to their folder and so to this one.
        size: Sides of the result in pixels.
        crop: Part of the shorter side that is kept, in (0, 1].
        max_pixels: A file of more pixels counts as bad.
        images: The folder of the images, if masks that are not of their size are to be refused.

    Raises:
        PreflightError: If masks are missing, damaged, no masks or of another size; it names them.
    """
    masks = np.empty((len(names), size, size), np.bool_)

    def fault(i: int) -> str | None:
        try:
            mask = _read((folder / names[i]).with_suffix(".png"), max_pixels)
            if images is not None:
                _require_size_of(images / names[i], mask, max_pixels)
        except BadImageError as error:
            return str(error)
        masks[i] = files.evaluation_view(mask, size=size, crop=crop) > _MIDDLE
        return None

    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter lock
        faults = [what for what in pool.map(fault, range(len(names))) if what is not None]
    if faults:
        more = [f"and {len(faults) - _LISTED:,} more"] if len(faults) > _LISTED else []
        lines = [f"{folder}: masks that cannot be used: {len(faults):,}", *faults[:_LISTED], *more]
        raise PreflightError(
            "\n  ".join(lines),
            hint="a mask has its image's name, ending in .png, and its image's width and height",
        )
    return torch.from_numpy(masks)


def automatic(images: Float[Tensor, "N 3 H W"]) -> Bool[Tensor, "N H W"] | None:
    """What is on the other side of Otsu's threshold than most of the image's border.

    Of what an image shows it knows nothing but how light it is: dark parts of a thing on a dark
    background are missed. It stands in for masks where there are none.

    Args:
        images: In [0, 1].

    Returns:
        One mask an image, which does not depend on the others. None where the images have no plain
        background: in the median image the threshold does not part two groups of pixels, or the
        border has its share of both.
    """
    luma = torch.tensor(_LUMA, dtype=torch.float64, device=images.device)
    light = (images.double() * luma[:, None, None]).sum(dim=1)
    levels = (light * (_LEVELS - 1)).round().long()
    threshold, separability = otsu(levels.flatten(1))
    above = levels > threshold[:, None, None]
    border = torch.ones_like(above[0])
    border[1:-1, 1:-1] = False
    outside = above[:, border].double().mean(dim=1)
    plain = torch.maximum(outside, 1 - outside)
    if separability.median() < SEPARABLE or plain.median() < PLAIN:
        return None
    return above ^ (outside > 0.5)[:, None, None]


def otsu(levels: Int[Tensor, "N P"]) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """The threshold of each image that parts its levels best, and how well it does.

    η = max_k (μ ω_k − μ_k)² / (ω_k (1 − ω_k)) / σ², where ω_k is the part of the pixels with levels
    up to k and μ_k the sum of level times part over those; μ and σ² are the image's mean and
    variance.

    Args:
        levels: 0 to 255.

    Returns:
        The lowest such k, and η in [0, 1]; 0 for an image of one level.
    """
    ones = torch.ones_like(levels, dtype=torch.float64)
    counts = ones.new_zeros(len(levels), _LEVELS).scatter_add_(1, levels, ones)
    level = torch.arange(_LEVELS, dtype=torch.float64, device=levels.device)
    # Not divided by the number of pixels: whole numbers are exact, and 0 where one side is empty.
    below, mass = counts.cumsum(dim=1), (counts * level).cumsum(dim=1)
    pixels, total = below[:, -1:], mass[:, -1:]
    between = (total * below - pixels * mass).square() / (below * (pixels - below))
    best, threshold = between.nan_to_num(nan=0.0).max(dim=1)
    variance = pixels * (counts * level.square()).sum(dim=1, keepdim=True) - total.square()
    return threshold, (best / variance[:, 0]).nan_to_num(nan=0.0)


def _read(path: Path, max_pixels: int) -> Image.Image:
    """A mask as it was drawn, black and white."""
    files.check_header(path, max_pixels=max_pixels)
    try:
        with Image.open(path, formats=("PNG",)) as image:
            found = _foreground(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise BadImageError(f"{path}: not a PNG") from None
    except Exception as error:  # damaged bytes are met with nearly every exception there is
        raise BadImageError(f"{path}: {error or type(error).__name__}") from None
    return Image.fromarray(found.astype(np.uint8) * 255)


def _foreground(image: Image.Image) -> Bool[np.ndarray, "H W"]:
    if image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema()[0] == 255:
        image = image.convert(image.mode[:-1])
    if image.mode not in ("1", "P", "L", "RGB"):
        raise ValueError(f"a mask is gray, has a palette or opaque colours, this is {image.mode}")
    values: UInt8[np.ndarray, "H W *C"] = np.asarray(image)
    if image.mode in ("1", "P"):
        found: np.ndarray = values != 0
        return found
    values = values.reshape(*values.shape[:2], -1).max(axis=2)
    found = values > (_MIDDLE if values.max() > 1 else 0)
    if np.count_nonzero(values) > 2 * np.count_nonzero(found):
        raise ValueError("neither black and white nor 0 and 1: more of it is dark gray than light")
    return found


def _require_size_of(path: Path, mask: Image.Image, max_pixels: int) -> None:
    image = files.decode(path, max_pixels=max_pixels)
    if image.size != mask.size:
        own, other = (f"{one.width:,} x {one.height:,}" for one in (mask, image))
        raise BadImageError(f"{path}: its mask has {own} pixels, the image {other}")
