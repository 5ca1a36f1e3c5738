"""Cut out a part of an image and scale it to full size.

Szegedy et al.: Going Deeper with Convolutions, CVPR 2015, arXiv:1409.4842, section 6.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from distill.component import Fraction, Positive
from distill.data.augment import _boxes
from distill.data.augment._augmentation import Augmentation, Plan
from distill.data.jpeg import Box

_BITS = 11  # of a weight: two weights and a pixel fill 30 bits


class ResizedCrop(Augmentation):
    """Cut out a box of random area and aspect ratio and scale it to full size, bilinear."""

    num_draws = _boxes.NUM_DRAWS

    def __init__(
        self,
        *,
        min_scale: Fraction = 0.08,
        max_scale: Fraction = 1.0,
        min_ratio: Positive = 0.75,
        max_ratio: Positive = 1.3333333333333333,
    ) -> None:
        self._scale = _boxes.interval(min_scale, max_scale, "scale")
        self._ratio = _boxes.interval(min_ratio, max_ratio, "ratio")

    def plan(
        self, uniforms: Float[ndarray, "n D"], *, height: int, width: int
    ) -> dict[str, ndarray]:
        """The box: its first row and column, its height and width.

        Where none of the random boxes fits, it is the largest centred one of an allowed ratio.
        """
        boxes = _boxes.draw(
            uniforms, scale=self._scale, ratio=self._ratio, height=height, width=width
        )
        return {
            "top": boxes.top,
            "left": boxes.left,
            "height": boxes.height,
            "width": boxes.width,
        }

    def apply(self, images: UInt8[Tensor, "B 3 H W"], plan: Plan) -> UInt8[Tensor, "B 3 H W"]:
        """The boxes at full size; in integers, so that every device gives the same pixels."""
        box = plan.device
        rows = images.permute(0, 2, 3, 1).int()
        rows = _stretch(rows, box["top"], box["height"])
        columns = _stretch(rows.transpose(1, 2), box["left"], box["width"])
        pixels = (columns + (1 << 2 * _BITS - 1)) >> 2 * _BITS
        resized = pixels.to(torch.uint8).permute(0, 3, 2, 1)
        return resized.contiguous(memory_format=torch.channels_last)

    def cut(
        self, image: Image.Image, uniforms: Float[ndarray, " D"], *, size: int
    ) -> UInt8[ndarray, "size size 3"]:
        """The box of an image of any size, scaled by Pillow, with antialias where it shrinks."""
        box = self.box(uniforms, image.width, image.height)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))

    def box(self, uniforms: Float[ndarray, " D"], width: int, height: int) -> Box:
        """The box in an image of this size."""
        plan = self.plan(uniforms[None], height=height, width=width)
        top, left, rows, columns = (int(plan[key][0]) for key in ("top", "left", "height", "width"))
        return Box(left, top, left + columns, top + rows)


def scaled(pixels: UInt8[ndarray, "h w 3"], *, size: int) -> UInt8[ndarray, "size size 3"]:
    """A cut box at full size, by torch, which takes a third of Pillow's time.

    Antialias and rounding are nearly Pillow's, but Pillow also looks a little outside of the box.
    """
    # A batch's axis that comes first gets the stride by which torch knows channels_last.
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    found = functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    whole: ndarray = found[0].permute(1, 2, 0).numpy()
    return whole


def _stretch(
    images: Int[Tensor, "B H W C"], start: Int[Tensor, " B"], length: Int[Tensor, " B"]
) -> Int[Tensor, "B H W C"]:
    """Rows start … start + length, interpolated to all H rows; values times 2^_BITS."""
    num, height = images.shape[:2]
    middle = torch.arange(height, device=images.device, dtype=torch.float64) + 0.5
    source = middle * length[:, None].double() / height - 0.5
    source = source.clamp(min=0).minimum(length[:, None].double() - 1)
    upper = source.floor()
    weight = ((source - upper) * (1 << _BITS)).round().int()[..., None, None]
    first = (torch.arange(num, device=images.device) * height + start)[:, None]
    upper = upper.long()
    lower = (upper + 1).minimum(length[:, None] - 1)
    flat = images.flatten(0, 1)
    above = flat.index_select(0, (first + upper).flatten()).view_as(images)
    below = flat.index_select(0, (first + lower).flatten()).view_as(images)
    return above * ((1 << _BITS) - weight) + below * weight
