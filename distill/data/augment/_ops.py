"""Operations on a batch of images, each image with an argument of its own.

The definitions are those of Pillow and torchvision on 8-bit images. Sums are of whole numbers and
all else is done pixel by pixel, so that an image's result does not depend on its neighbours in the
batch or on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from distill.data.augment._augmentation import Plan

Images = UInt8[Tensor, "n 3 H W"]
Arguments = Float[Tensor, "n A"]


def identity(images: Images, arguments: Arguments) -> Images:
    """The images as they are."""
    return images


def affine(images: Images, arguments: Arguments) -> Images:
    """Each pixel from the nearest one to where a 2x3 matrix maps it; zero from outside the image.

    Coordinates are in pixels from the centre of the image, x before y.
    """
    num, channels, height, width = images.shape
    a, b, c, d, e, f = arguments.float()[..., None, None].unbind(1)
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    column = (a * x + b * y + c + (width - 1) / 2).round()
    row = (d * x + e * y + f + (height - 1) / 2).round()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = torch.where(inside, row * width + column, 0).long()
    place = place.view(num, 1, height * width).expand(-1, channels, -1)
    moved = images.flatten(2).gather(2, place).view(num, channels, height, width)
    return moved * inside[:, None]


def brightness(images: Images, arguments: Arguments) -> Images:
    """Values times a factor."""
    return _to_uint8(images * _each(arguments))


def contrast(images: Images, arguments: Arguments) -> Images:
    """The image's mean luma, moved away from or towards by a factor."""
    luma = _luma(images)
    mean = luma.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64) / luma[0].numel()
    return _blend(images, mean.float(), arguments)


def saturation(images: Images, arguments: Arguments) -> Images:
    """Every pixel's luma, moved away from or towards by a factor."""
    return _blend(images, _luma(images), arguments)


def sharpness(images: Images, arguments: Arguments) -> Images:
    """The image blurred by [[1 1 1] [1 5 1] [1 1 1]] / 13, moved away from or towards by a factor.

    The outermost pixels stay as they are.
    """
    if min(images.shape[-2:]) < 3:
        return images
    values = images.short()
    inner = values[..., 1:-1, 1:-1]
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    sharpened = images.clone()
    sharpened[..., 1:-1, 1:-1] = _blend(inner, (sums / 13).round(), arguments)
    return sharpened


def posterize(images: Images, arguments: Arguments) -> Images:
    """The bits of every value that a mask keeps."""
    return images & _each(arguments).to(torch.uint8)


def solarize(images: Images, arguments: Arguments) -> Images:
    """Values of a threshold or more, inverted."""
    return images ^ ((images >= _each(arguments)).to(torch.uint8) * 255)


def autocontrast(images: Images, arguments: Arguments) -> Images:
    """Every channel stretched to the full range of values."""
    low = images.amin(dim=(2, 3), keepdim=True).float()
    high = images.amax(dim=(2, 3), keepdim=True).float()
    flat = high == low
    scale = torch.where(flat, 1.0, (high - low) * (1 / 255))
    return _to_uint8((images - torch.where(flat, 0.0, low)) / scale)


def equalize(images: Images, arguments: Arguments) -> Images:
    """Every channel mapped so that its values are spread evenly.

    Value k becomes (the number of pixels below k + step // 2) // step, where step is 1/255 of the
    number of pixels below the greatest value; a channel whose step is 0 stays as it is.
    """
    values = images.flatten(2).long()
    ones = torch.ones((), dtype=torch.long, device=images.device).expand_as(values)
    counts = values.new_zeros(*images.shape[:2], 256).scatter_add_(2, values, ones)
    below = counts.cumsum(dim=2) - counts
    greatest = values.amax(dim=2, keepdim=True)
    step = below.gather(2, greatest) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.to(torch.uint8).gather(2, values).view_as(images)


def hue(images: Images, arguments: Arguments) -> Images:
    """Hues turned by a part of the full circle, as seen in HSV."""
    values = images.float() / torch.full((), 255.0, device=images.device)
    red, green, blue = values.unbind(1)
    high, low = values.amax(dim=1), values.amin(dim=1)
    span = high - low
    turns = torch.where(
        red == high,
        green - blue,
        torch.where(green == high, blue - red + 2 * span, red - green + 4 * span),
    )
    sixths = turns / torch.where(span > 0, span, 1.0) + 6 * _each(arguments)[:, 0]
    # A channel falls from the highest value to the lowest within a sixth, 1/3 turn after another.
    shift = 5 - 2 * torch.arange(3, device=images.device)
    angle = (sixths[:, None] + shift[:, None, None]).remainder(6)
    fall = torch.minimum(angle, 4 - angle).clamp(0, 1)
    turned = high[:, None] - span[:, None] * fall
    return _to_uint8(turned * 255.999)  # the last value's share of [0, 1] is as wide as any other's


Operation = Callable[[Images, Arguments], Images]

# An operation's number in a plan is its place here.
OPERATIONS: tuple[Operation, ...] = (
    identity,
    affine,
    brightness,
    contrast,
    saturation,
    sharpness,
    posterize,
    solarize,
    autocontrast,
    equalize,
    hue,
)


def apply(images: UInt8[Tensor, "B 3 H W"], plan: Plan) -> UInt8[Tensor, "B 3 H W"]:
    """The images after every round of their own operations.

    `plan` has `operation` (B, R), numbers of `OPERATIONS`, and `arguments` (B, R, A). Images are
    sorted by operation on the device; how many have each is known on the host, so that nothing
    waits.
    """
    for turn in range(plan.host["operation"].shape[1]):
        chosen, arguments = plan.device["operation"][:, turn], plan.device["arguments"][:, turn]
        images = _round(images, plan.host["operation"][:, turn], chosen, arguments)
    return images


def _round(
    images: Images, on_host: Int[ndarray, " n"], chosen: Int[Tensor, " n"], arguments: Arguments
) -> Images:
    counts = np.bincount(on_host, minlength=len(OPERATIONS)).tolist()
    order = chosen.argsort()
    groups = zip(
        OPERATIONS,
        torch.split(images.index_select(0, order), counts),
        torch.split(arguments.index_select(0, order), counts),
        strict=True,
    )
    changed = [operation(part, drawn) for operation, part, drawn in groups if len(part)]
    return torch.cat(changed).index_select(0, order.argsort())


def _each(arguments: Arguments) -> Float[Tensor, "n 1 1 1"]:
    return arguments[:, 0, None, None, None].float()


def _luma(images: Images) -> Float[Tensor, "n 1 H W"]:
    """floor(0.2989 R + 0.587 G + 0.114 B)."""
    red, green, blue = images.float().unbind(1)
    # The sum is exact; a half keeps the quotient clear of whole numbers, however it is rounded.
    return ((2989 * red + 5870 * green + 1140 * blue + 0.5) / 10000).floor()[:, None]


def _blend(images: Tensor, other: Float[Tensor, "n ..."], arguments: Arguments) -> Images:
    rest = (1 - arguments[:, 0, None, None, None]).float()
    values = images.float()
    return _to_uint8(values + (other - values) * rest)  # the same value where both are the same


def _to_uint8(values: Float[Tensor, "n 3 H W"]) -> Images:
    return values.clamp(0, 255).to(torch.uint8)
