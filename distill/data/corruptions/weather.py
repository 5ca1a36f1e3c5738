"""Snow, frost and fog.

Alain Fournier, Don Fussell, Loren Carpenter: Computer Rendering of Stochastic Models, CACM 1982
(the landscape that fog is made of).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from distill.data.corruptions import draws
from distill.data.corruptions.blur import zoomed
from distill.data.corruptions.draws import Key
from distill.data.corruptions.filters import Images, motion

_LUMA = (0.299, 0.587, 0.114)

# Of the photographs in the published recipe, which draws one of five, two of them the same: red,
# green and blue in the mean, and the standard deviation of their brightness over 224 x 224 pixels.
_FROST = (
    (0.30, 0.58, 0.65, 0.06),
    (0.78, 0.79, 0.83, 0.08),
    (0.78, 0.79, 0.83, 0.08),
    (0.57, 0.62, 0.67, 0.10),
    (0.40, 0.44, 0.49, 0.14),
)
_ROUGHNESS = 1.1  # pixels at distances of 1 and 8 correlate by 0.8 and 0.4 as in the photographs


def snow(
    images: Images,
    key: Key,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    kept: float,
) -> Images:
    """A paler image under flakes that fall in one direction, and again turned by 180 degrees.

    Flakes are normal noise, enlarged, what is below a threshold left out, smeared. The image is
    kept · x + (1 − kept) · max(x, 1.5 · luma + 0.5).

    Args:
        images: The images.
        key: Their keys.
        mean: Of the noise.
        deviation: Of the noise.
        zoom: How much it is enlarged.
        threshold: Below it there is no snow.
        radius: Half of the path of a flake, in pixels.
        sigma: How far a flake's trace goes, in pixels.
        kept: Part of the image's own colours.
    """
    noise = mean + deviation * draws.normal(key, 1, *images.shape[-2:])
    layer = zoomed(noise, zoom)
    layer = torch.where(layer < threshold, 0.0, layer).clamp(0, 1)
    fallen = motion(layer, -135 + 90 * draws.uniform(key, stream=1), radius, sigma)
    luma = (images * images.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    pale = kept * images + (1 - kept) * images.maximum(1.5 * luma + 0.5)
    return pale + fallen + fallen.flip(-2, -1)


def fog(images: Images, key: Key, thickness: float, decay: float) -> Images:
    """(x + t · landscape) · m / (m + t), where m is the greatest value of the image.

    Args:
        images: The images.
        key: Their keys.
        thickness: t.
        decay: Of the landscape; the less, the rougher.
    """
    most = images.amax(dim=(1, 2, 3), keepdim=True)
    layer = _landscape(images, key, decay)[:, None]
    return (images + thickness * layer) * most / (most + thickness)


def frost(images: Images, key: Key, kept: float, strength: float) -> Images:
    """The image times `kept` plus `strength` times ice, a pattern of bright ridges.

    The published recipe lays photographs of frosted windows over the images. This pattern has the
    mean colour and the spread of one of them, not its shapes.
    """
    ridges = 1 - (2 * _landscape(images, key, _ROUGHNESS) - 1).abs()
    deviation, mean = torch.std_mean(ridges, dim=(1, 2), keepdim=True)
    photograph = (draws.uniform(key, stream=1) * len(_FROST)).long()
    drawn = images.new_tensor(_FROST)[photograph][:, :, None, None]
    ice = drawn[:, :3] + drawn[:, 3:] * ((ridges - mean) / deviation)[:, None]
    return kept * images + strength * ice.clamp(0, 1)


def _landscape(images: Images, key: Key, decay: float) -> Float[Tensor, "B H W"]:
    """Random landscapes in [0, 1], by midpoint displacement (diamond-square).

    On a torus of the least power of two that holds the image. A point is the mean of four around
    it, plus a number in ± (100 / decay^n)² after n halvings of their distance. The whole landscape
    is stretched to [0, 1].
    """
    height, width = images.shape[-2:]
    size = 1 << (max(height, width) - 1).bit_length()
    noise = 2 * draws.uniform(key, size, size) - 1
    land = torch.zeros_like(noise)
    step, wobble = size, 100.0
    while step > 1:
        half = step // 2
        corners, middles = land[:, ::step, ::step], land[:, half::step, half::step]
        pairs = corners + corners.roll(-1, dims=1)
        middles.copy_((pairs + pairs.roll(-1, dims=2)) / 4)
        middles += wobble**2 * noise[:, half::step, half::step]
        beside = corners + corners.roll(-1, dims=2) + middles + middles.roll(1, dims=1)
        below = corners + corners.roll(-1, dims=1) + middles + middles.roll(1, dims=2)
        land[:, ::step, half::step] = beside / 4 + wobble**2 * noise[:, ::step, half::step]
        land[:, half::step, ::step] = below / 4 + wobble**2 * noise[:, half::step, ::step]
        step, wobble = half, wobble / decay
    land -= land.amin(dim=(1, 2), keepdim=True)
    return (land / land.amax(dim=(1, 2), keepdim=True))[:, :height, :width]
