"""Which part of an image an answer comes from, as a map of heat over it.

Attention rollout is Abnar, Zuidema: Quantifying Attention Flow in Transformers, ACL 2020,
arXiv:2005.00928; saliency is Simonyan, Vedaldi, Zisserman: Deep Inside Convolutional Networks:
Visualising Image Classification Models and Saliency Maps, 2014, arXiv:1312.6034.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from distill.diagnostics import UndefinedError
from distill.diagnostics.attention import at_once, attending
from distill.diagnostics.receptive_field import differentiating
from distill.diagnostics.tapped import tapped
from distill.models.anatomy import ATTENTION
from distill.models.network import Network
from distill.types import Anatomy, AttentionSite

# Viridis (Smith, van der Walt: 2015) at equal steps: it looks equally steep everywhere, gets
# lighter all the way and so reads alike with any colour vision.
_COLOURS = (
    (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128),
    (94, 201, 98), (173, 220, 48), (253, 231, 37),
)  # fmt: skip
_SIDE = 224  # pixels of a picture's shorter side, at least
_HOTTEST = 0.99  # part of the heat below the end of the scale: one pixel would leave no other seen
_COVER = 0.6  # of the image that its heat hides


def rollout(
    network: Network, images: Float[Tensor, "N 3 H W"], *, batch_size: int = 64
) -> Float[Tensor, "N h w"]:
    """How much of each cell of the image reaches the classifier by attention.

    The rows of `rolled` of those tokens that the classifier reads, a class token or all cells,
    averaged; over the cells, at a sum of 1. What reads the last block's tokens by attention of its
    own counts as reading all cells alike.

    Args:
        network: A row of at least three equal blocks with one layer of attention each, as a ViT.
        images: In [0, 1], on its device.
        batch_size: Images at once; another size changes nothing but the rounding. Fewer are taken
            where maps are large.

    Returns:
        On the CPU in float64.

    Raises:
        UndefinedError: If it is another network.
    """
    copied, anatomy = attending(network, images)
    if not _isotropic(anatomy):
        raise UndefinedError("it is no row of blocks that attend to the same tokens")
    last = anatomy.attention[-1]
    read = _read(copied, anatomy.blocks[-1].name, last, images)
    found = []
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for batch in torch.split(images, at_once(anatomy.attention, batch_size)):
            maps = copied(batch).features
            whole = rolled([maps.pop(site.name) for site in anatomy.attention])
            found.append(whole[:, read, last.prefix :].mean(dim=1))
    heat = torch.cat(found).cpu()
    return (heat / heat.sum(dim=1, keepdim=True)).reshape(-1, *last.queries)


def rolled(maps: Sequence[Float[Tensor, "B A n n"]]) -> Float[Tensor, "B N N"]:
    """How much of each token of the first block is in each of the last: Π (½ A + ½ I).

    A is the mean over heads, and I stands for what goes past the attention. Rows sum to 1. Tokens
    that join in front behind some blocks, as ConViT's class token does, are themselves before.

    Args:
        maps: From the first block to the last; rows sum to 1.
    """
    whole = torch.eye(maps[-1].shape[-1], dtype=torch.float64, device=maps[-1].device)
    whole = whole.expand(len(maps[-1]), -1, -1)
    for rows in maps:
        front = whole.shape[1] - rows.shape[-1]
        own = whole[:, front:]
        mixed = (rows.double().mean(dim=1) @ own + own) / 2
        whole = torch.cat([whole[:, :front], mixed], dim=1)
    return whole


def saliency(
    network: Network, images: Float[Tensor, "N 3 H W"], *, batch_size: int = 32
) -> Float[Tensor, "N H W"]:
    """How strongly each pixel moves the logit of the class that is predicted.

    max over colour channels of |∂ z_k / ∂ x|, k = argmax z.

    Args:
        network: Any.
        images: In [0, 1], on its device.
        batch_size: Images at once; another size changes nothing but the rounding.

    Returns:
        On the CPU in float64; in logits from black to white.
    """
    copied, found = tapped(network, ()), []
    with differentiating(copied, images):
        for batch in torch.split(images, batch_size):
            x = batch.detach().clone().requires_grad_()
            logits = copied(x).logits
            predicted = logits.gather(1, logits.argmax(dim=1, keepdim=True))
            (gradient,) = torch.autograd.grad(predicted.sum(), x)
            found.append(gradient.double().abs().amax(dim=1))
    return torch.cat(found).cpu()


def overlay(
    image: UInt8[np.ndarray, "H W 3"], heat: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "sH sW 3"]:
    """The image in grey, under the colours of its heat from 0 (dark) to most (light).

    Enlarged by a whole number s to a shorter side of at least 224 pixels: a pixel stays a square,
    heat runs on linearly between the centres of its cells. The scale ends at the heat that 1 % of
    the picture exceeds.

    Args:
        image: To look at.
        heat: Not negative; over the whole image.
    """
    height, width = image.shape[:2]
    by = max(1, math.ceil(_SIDE / min(height, width)))
    grey = image @ np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
    size = (height * by, width * by)
    enlarged = F.interpolate(
        torch.from_numpy(heat.astype(np.float64))[None, None], size, mode="bilinear"
    )[0, 0].numpy()
    most = float(np.quantile(enlarged, _HOTTEST)) or float(enlarged.max()) or 1.0
    part = np.clip(enlarged / most, 0, 1)
    places = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack(
        [np.interp(part, places, channel) for channel in zip(*_COLOURS, strict=True)], axis=-1
    )
    under = grey.repeat(by, axis=0).repeat(by, axis=1)[..., None]
    picture: np.ndarray = (_COVER * colours + (1 - _COVER) * under).round().astype(np.uint8)
    return picture


def _isotropic(anatomy: Anatomy) -> bool:
    """Whether blocks and layers of attention are one to one, all over the same grid."""
    sites, blocks = anatomy.attention, anatomy.blocks
    if len(sites) != len(blocks):
        return False
    return all(
        site.queries == site.keys == block.grid
        and f"{site.name.removesuffix(ATTENTION)}.".startswith(f"{block.name}.")
        for site, block in zip(sites, blocks, strict=True)
    )


def _read(
    copied: Network, block: str, last: AttentionSite, images: Float[Tensor, "N 3 H W"]
) -> Bool[Tensor, " n"]:
    """Which of the tokens that leave the last block the classifier reads.

    Those that leave no number of the answer if they are none themselves, whatever the weights.
    """
    front, cells = last.prefix, math.prod(last.queries)

    def broken(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        """In each copy of an image another token in front, in the last all cells."""
        output = output.clone()
        for i in range(front):
            output[i, i] = torch.nan
        output[front, front:] = torch.nan
        return output

    if not front:
        return torch.ones(cells, dtype=torch.bool, device=images.device)
    handle = copied.backbone.get_submodule(block).register_forward_hook(broken)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        logits = copied(images[:1].expand(front + 1, -1, -1, -1)).logits
    handle.remove()
    shows = logits.isnan().any(dim=1)
    return torch.cat([shows[:front], shows[front:].expand(cells)])
