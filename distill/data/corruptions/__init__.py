"""Images as the world, lenses and codecs spoil them, at five severities.

Hendrycks, Dietterich: Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, ICLR 2019, arXiv:1903.12261.

A corrupted image is a pure function of the image, the seed, its id, the corruption and its
severity. All is computed in float64 and rounded to 256 levels at the end: last bits, which depend
on the device and on the size of a batch, decide about one value in 10^10.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.component import suggestion
from distill.data.corruptions import affine, blur, digital, draws, noise, spatter, tables, weather
from distill.data.pixels import to_float

Operation = Callable[..., Tensor]  # of images in float64, the keys of their numbers, constants

_COMMON: dict[str, Operation] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}
_EXTRA: dict[str, Operation] = {
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": spatter.spatter,
    "saturate": digital.saturate,
}
_AFFINE: dict[str, Operation] = {
    "translate": affine.translate,
    "rotate": affine.rotate,
    "scale": affine.scale,
}
_OPERATIONS = _COMMON | _EXTRA | _AFFINE

SEVERITIES = (1, 2, 3, 4, 5)
COMMON = tuple(_COMMON)
EXTRA = tuple(_EXTRA)
AFFINE = tuple(_AFFINE)
BASIC = ("gaussian_noise", "gaussian_blur", "contrast", "translate", "rotate")  # the plainest
GROUPS = {"common": COMMON, "extra": EXTRA, "affine": AFFINE, "basic": BASIC}

# What is not the published recipe, and why.
APPROXIMATED = {
    "frost": "a made pattern stands in for the photographs of frosted windows that the published "
    "recipe lays over the images",
}

_AT_ONCE = 2**20  # values; more would leave the processor's caches, and fill a device's memory


def names(*groups: str) -> tuple[str, ...]:
    """The corruptions of these groups, each once; all of them where none is named.

    Raises:
        ValueError: If there is no such group.
    """
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"no group {group!r} of corruptions{suggestion(group, [*GROUPS])}")
    return tuple(dict.fromkeys(name for group in groups or GROUPS for name in GROUPS[group]))


def corrupt(
    images: Float[Tensor, "B 3 H W"],
    ids: Int[Tensor, " B"],
    name: str,
    severity: int,
    *,
    seed: int = 0,
) -> Float[Tensor, "B 3 H W"]:
    """The images with one corruption, as a file of 8 bits would hold them.

    The constants are the published ones for the size (`distill.data.corruptions.tables`). Where the
    published scripts cut values off to 8 bits, they are rounded here: half a level brighter in the
    mean.

    Args:
        images: In [0, 1], of any size from 8 pixels a side; taken to the nearest of 256 levels.
        ids: What tells the images apart: the same id gets the same numbers in any batch.
        name: Of the corruption.
        severity: 1 to 5.
        seed: Of all random numbers.

    Returns:
        In [0, 1], multiples of 1/255, on the device of the images.

    Raises:
        ValueError: If there is no such corruption or severity.
    """
    if name not in _OPERATIONS:
        raise ValueError(f"no corruption {name!r}{suggestion(name, [*_OPERATIONS])}")
    if severity not in SEVERITIES:
        raise ValueError(f"{name}: severity is {severity}, and there are 1 to 5")
    constants = tables.constants(name, severity, min(images.shape[-2:]))
    operation = _OPERATIONS[name]
    key = draws.keys(seed, name, severity, ids).to(images.device)
    size = max(1, _AT_ONCE // images[0].numel()) if len(images) else 1
    levels = []
    with torch.no_grad():
        for part, own in zip(torch.split(images, size), torch.split(key, size), strict=True):
            clean = (part.double() * 255).round() / 255
            spoilt = operation(clean, own, *constants)
            levels.append((spoilt * 255).round().clamp(0, 255).to(torch.uint8))
    return to_float(torch.cat(levels))
