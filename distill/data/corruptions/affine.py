"""The image moved, turned or scaled; the border is mirrored."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from distill.data.corruptions import draws, filters
from distill.data.corruptions.draws import Key
from distill.data.corruptions.filters import Images

_NOMINAL = 32  # pixels of the side that lengths are given for; smaller images move as far


def translate(images: Images, key: Key, length: int) -> Images:
    """Moved up, down, left or right by whole pixels.

    Args:
        images: The images.
        key: Their keys.
        length: In pixels; in 32nds of the shorter side, rounded, where that has 64 or more.
    """
    side = min(images.shape[-2:])
    pixels = round(length * side / _NOMINAL) if side >= 64 else length
    quarter = (draws.uniform(key) * 4).floor() * (math.pi / 2)
    y, x = filters.positions(images)
    dy, dx = ((pixels * part).round()[:, None, None] for part in (quarter.sin(), quarter.cos()))
    place = torch.zeros_like(images[:, 0])
    return filters.warp(images, place + y + dy, place + x + dx, border="mirror")


def rotate(images: Images, key: Key, degrees: float) -> Images:
    """Turned around the middle, to the left or to the right."""
    angle = _sign(key) * (degrees * math.pi / 180)
    return _about_middle(images, angle.cos(), angle.sin())


def scale(images: Images, key: Key, factor: float) -> Images:
    """Enlarged around the middle by a factor, or shrunk by it."""
    return _about_middle(images, factor ** _sign(key), torch.zeros_like(key).double())


def _sign(key: Key) -> Float[Tensor, " B"]:
    return (draws.uniform(key) - 0.5).sign()


def _about_middle(images: Images, cos: Float[Tensor, " B"], sin: Float[Tensor, " B"]) -> Images:
    """Each pixel from where [[cos, −sin], [sin, cos]] takes it, about the middle."""
    height, width = images.shape[-2:]
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y, x = filters.positions(images)
    cos, sin = cos[:, None, None], sin[:, None, None]
    source_y = sin * (x - middle_x) + cos * (y - middle_y) + middle_y
    source_x = cos * (x - middle_x) - sin * (y - middle_y) + middle_x
    return filters.warp(images, source_y, source_x, border="mirror")
