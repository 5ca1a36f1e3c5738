"""What a trained network still recognises when the parts of its images change places.

What is left of its accuracy says how little it relies on their arrangement: a bag of patches loses
nothing by a shuffle of patches of its own size, a network that goes by shapes nearly everything.
Seams are edges that it was never shown, so the loss overstates what the arrangement is worth; what
can be learned without it is told by a training on rearranged images (the recipe's `data.control`).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.data.controls import pixel_order
from distill.data.hashing import hash64
from distill.diagnostics import UndefinedError

_PATCHES = int.from_bytes(b"patches", "big")  # keeps these draws apart from those of any sample


def correct(
    network: nn.Module,
    images: Float[Tensor, "N 3 H W"],
    labels: Int[Tensor, " N"],
    ids: Int[Tensor, " N"],
    *,
    grid: int | None,
    seed: int = 0,
    batch_size: int = 64,
) -> Bool[Tensor, " N"]:
    """Whether the class that is predicted for each rearranged image is its label.

    Args:
        network: In eval mode; gives `Outputs`.
        images: In [0, 1], on its device and of its precision.
        labels: The class of each.
        ids: What decides each image's permutation, as `patches` takes them.
        grid: Patches along a side that are shuffled as `patches` does; None rearranges the pixels
            as `pixels` does.
        seed: Decides the permutations.
        batch_size: Images at once; another size changes nothing but the rounding.

    Raises:
        UndefinedError: If the images have fewer pixels than patches along a side.
    """
    answers = []
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        columns = (torch.split(column, batch_size) for column in (images, labels, ids))
        for part, known, own in zip(*columns, strict=True):
            moved = pixels(part, seed=seed) if grid is None else patches(part, own, grid, seed=seed)
            answers.append(network(moved).logits.argmax(dim=-1) == known)
    return torch.cat(answers)


def patches(
    images: Float[Tensor, "B C H W"], ids: Int[Tensor, " B"], grid: int, *, seed: int = 0
) -> Float[Tensor, "B C H W"]:
    """The images with the patches of a grid shuffled, each image's in its own way.

    A permutation is a hash of seed, grid and id in order: all are equally probable, so that a few
    images stay as they are where there are few patches (one of 24 in a grid of 2 x 2). Patches have
    the same size in whole pixels; what a grid in the middle leaves over stays where it is, as a
    border.

    Args:
        images: The images.
        ids: Of the samples; an image's permutation follows from its own alone.
        grid: Patches along a side.
        seed: Decides the permutations.

    Raises:
        UndefinedError: If the images have fewer pixels than patches along a side.
    """
    height, width = images.shape[-2:]
    rows, columns = height // grid, width // grid
    if not (rows and columns):
        raise UndefinedError(f"its images of {height} x {width} px have no {grid} x {grid} patches")
    keys = hash64(seed, _PATCHES, grid, ids.cpu().numpy()[:, None], np.arange(grid**2))
    order = torch.from_numpy(np.argsort(keys, axis=1, kind="stable")).to(images.device)
    size, whole = (rows, columns), (rows * grid, columns * grid)
    top, left = (height - whole[0]) // 2, (width - whole[1]) // 2
    middle = ..., slice(top, top + whole[0]), slice(left, left + whole[1])
    cut = F.unfold(images[middle], size, stride=size)  # a patch a column
    cut = cut.gather(2, order[:, None].expand_as(cut))
    shuffled = images.clone()
    shuffled[middle] = F.fold(cut, whole, size, stride=size)
    return shuffled


def pixels(images: Float[Tensor, "B C H W"], *, seed: int = 0) -> Float[Tensor, "B C H W"]:
    """The images with their pixels rearranged, all in the same way.

    It is the permutation of the recipe's `data.control: permuted-pixels` with the same seed.

    Args:
        images: The images; their channels stay together.
        seed: Decides the permutation, along with the size.
    """
    order = torch.from_numpy(pixel_order(images.shape[-2] * images.shape[-1], seed=seed))
    return images.flatten(2)[..., order.to(images.device)].reshape(images.shape)
