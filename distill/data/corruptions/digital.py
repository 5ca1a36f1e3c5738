"""What cameras and codecs do: brightness, contrast, colour, resolution, compression, distortion."""

from __future__ import annotations

import functools
from io import BytesIO

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from distill.data.corruptions import draws, filters
from distill.data.corruptions.draws import Key
from distill.data.corruptions.filters import Images


def brightness(images: Images, key: Key, more: float) -> Images:
    """The V of HSV plus `more`, at most 1: hue and saturation stay as they are."""
    value = images.amax(dim=1, keepdim=True)
    lit = (value + more).clamp(max=1)
    return torch.where(value > 0, images * lit / value, lit)


def contrast(images: Images, key: Key, factor: float) -> Images:
    """(x − m) · factor + m, m being the mean of the channel over the image."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (images - mean) * factor + mean


def saturate(images: Images, key: Key, factor: float, more: float) -> Images:
    """The S of HSV times `factor` plus `more`, in [0, 1]. Grey has the hue of red."""
    value = images.amax(dim=1, keepdim=True)
    span = value - images.amin(dim=1, keepdim=True)
    red = images.new_tensor((0.0, 1.0, 1.0))[:, None, None]
    # How far each channel lies below the highest: 1 for the lowest, whatever the saturation.
    fall = torch.where(span > 0, (value - images) / span, red)
    saturation = torch.where(value > 0, span / value, 0.0)
    return value * (1 - (saturation * factor + more).clamp(0, 1) * fall)


def pixelate(images: Images, key: Key, factor: float) -> Images:
    """Shrunk to ⌊n · factor⌋ pixels of n a side by Pillow's box filter, and back.

    Every step is rounded to 256 levels, as Pillow does.
    """
    height, width = images.shape[-2:]
    small = int(height * factor), int(width * factor)
    levels = images * 255
    for sides in (small, (height, width)):
        rows, columns = (
            _box(n, new).to(levels.device) for n, new in zip(levels.shape[-2:], sides, strict=True)
        )
        levels = (rows @ (levels @ columns.T + 0.5).floor() + 0.5).floor()
    return levels / 255


@functools.lru_cache(maxsize=32)
def _box(size: int, new: int) -> Float[Tensor, "new size"]:
    """The mean of the pixels whose middle lies in the new pixel; of a smaller one, the nearest."""
    scale = size / new
    middle = (np.arange(new)[:, None] + 0.5) * scale
    offset = np.arange(size) + 0.5 - middle
    half = max(scale, 1) / 2
    inside = ((offset > -half) & (offset <= half)).astype(np.float64)
    return torch.from_numpy(inside / inside.sum(axis=1, keepdims=True))


def jpeg_compression(images: Images, key: Key, quality: int) -> Images:
    """Written to JPEG by Pillow, chroma at half the resolution, and read again."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    coded = torch.from_numpy(np.stack([_jpeg(one, quality) for one in pixels]))
    return coded.to(images.device).permute(0, 3, 1, 2).double() / 255


def _jpeg(pixels: UInt8[np.ndarray, "H W 3"], quality: int) -> UInt8[np.ndarray, "H W 3"]:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return np.asarray(image)


def elastic_transform(
    images: Images, key: Key, strength: float, sigma: float, shift: float
) -> Images:
    """Sheared at random, then every pixel displaced, neighbours alike.

    Three corners of the square that fills the middle two thirds move by up to `shift` in both
    directions, and the image with them. Then each pixel is taken from `strength` times a uniform
    number in [−1, 1] away, in both directions, which is blurred by a Gaussian of σ.

    Args:
        images: The images.
        key: Their keys.
        strength: In parts of the shorter side.
        sigma: σ in parts of the shorter side.
        shift: In parts of the shorter side.
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    y, x = filters.positions(images)
    half = side // 3
    moved = (2 * draws.uniform(key, 2, 3) - 1) * (shift * side)
    lower = moved.new_tensor([[half, -half, -half], [half, half, -half]])
    corners = moved + lower + lower.new_tensor([[height // 2], [width // 2]])
    # The corners are (+, +), (−, +), (−, −): edges of the square become these two vectors.
    down = (corners[:, :, 0] - corners[:, :, 1])[..., None, None] / (2 * half)
    right = (corners[:, :, 1] - corners[:, :, 2])[..., None, None] / (2 * half)
    from_y, from_x = y - corners[:, 0, 1, None, None], x - corners[:, 1, 1, None, None]
    area = down[:, 0] * right[:, 1] - down[:, 1] * right[:, 0]
    source_y = (right[:, 1] * from_y - right[:, 0] * from_x) / area + height // 2 - half
    source_x = (down[:, 0] * from_x - down[:, 1] * from_y) / area + width // 2 + half
    sheared = filters.warp(images, source_y, source_x, border="mirror")
    noise = 2 * draws.uniform(key, 2, height, width, stream=1) - 1
    field = filters.gaussian(noise, sigma * side, border="reflect", truncate=3)
    dy, dx = (field * (strength * side)).unbind(1)
    return filters.warp(sheared, y + dy, x + dx, border="reflect")
