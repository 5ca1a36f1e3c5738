"""Random boxes in images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from distill.errors import RecipeError

_TRIES = 10
NUM_DRAWS = 2 * _TRIES + 2


class Boxes(NamedTuple):
    """Boxes with whole pixels for edges."""

    top: Int[ndarray, " n"]
    left: Int[ndarray, " n"]
    height: Int[ndarray, " n"]
    width: Int[ndarray, " n"]
    found: Bool[ndarray, " n"]  # False: no try fitted, and the box is the largest centred one


def interval(low: float, high: float, name: str) -> tuple[float, float]:
    """Both ends of a range of recipe keys `min_NAME` and `max_NAME`.

    Raises:
        RecipeError: If the first is the greater.
    """
    if low > high:
        raise RecipeError(f"min_{name} is {low}, greater than max_{name}, {high}")
    return low, high


def draw(
    uniforms: Float[ndarray, "n D"],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    height: int,
    width: int,
) -> Boxes:
    """Boxes of random area, aspect ratio and place.

    The area is uniform, the logarithm of width / height is uniform. The first of 10 tries that
    fits into the image counts.

    Args:
        uniforms: Numbers in [0, 1), `NUM_DRAWS` a box.
        scale: Least and greatest part of the image's area.
        ratio: Least and greatest width / height.
        height: Rows of the image.
        width: Columns of the image.
    """
    tries = uniforms[:, : 2 * _TRIES].reshape(-1, _TRIES, 2)
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * tries[..., 1])
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first, found = (np.arange(len(tries)), fits.argmax(axis=1)), fits.any(axis=1)
    box_width = np.where(found, widths[first], min(width, np.rint(height * ratio[1])))
    box_height = np.where(found, heights[first], min(height, np.rint(width / ratio[0])))
    below, beside = height - box_height, width - box_width
    top = np.where(found, uniforms[:, -2] * (below + 1), below // 2)
    left = np.where(found, uniforms[:, -1] * (beside + 1), beside // 2)
    edges = [edge.astype(np.int64) for edge in (top, left, box_height, box_width)]
    return Boxes(edges[0], edges[1], edges[2], edges[3], found)


def mask(
    edges: Int[Tensor, "n 4"], *, height: int, width: int, channels: int
) -> UInt8[Tensor, "n H WC"]:
    """All bits inside a box and none outside, for pixels in channels_last memory.

    Bytes are quicker than booleans, and columns and channels are one axis so that rows of memory
    are as long as can be.

    Args:
        edges: First row, last row + 1, first column, last column + 1.
        height: Rows of the image.
        width: Columns of the image.
        channels: Channels of the image.
    """
    top, bottom, left, right = edges[..., None].unbind(1)
    row = torch.arange(height, device=edges.device)
    column = torch.arange(width * channels, device=edges.device) // channels
    in_row = ((row >= top) & (row < bottom)).to(torch.uint8) * 255
    in_column = ((column >= left) & (column < right)).to(torch.uint8) * 255
    return in_row[..., None] & in_column[:, None]
