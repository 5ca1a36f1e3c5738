"""Random numbers for batches of images, each image with a generator of its own.

They are those of `distill.data.hashing`, on the device: a pure function of an image's key, of what
they are for and of their place, so that an image's numbers do not depend on its batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from distill.data.hashing import hash64

Key = Int64[Tensor, " B"]  # what an image's numbers follow from, one a corruption and severity


def keys(seed: int, name: str, severity: int, ids: Int[Tensor, " B"]) -> Key:
    """One number an image: `hash64` of the seed, the name's bytes, the severity and the id."""
    whole = hash64(seed, *name.encode(), severity)
    return _hashed(torch.from_numpy(whole.view(np.int64)).to(ids.device), ids.long())


def uniform(key: Key, *shape: int, stream: int = 0) -> Float[Tensor, "B ..."]:
    """Numbers in (0, 1) with 32 random bits each: (k + ½) / 2^32.

    Args:
        key: As `keys` gives them.
        shape: Of what one image gets.
        stream: What the numbers are for; streams are independent of each other.
    """
    words = _words(key, stream, math.prod(shape))
    return ((words.double() + (2**31 + 0.5)) * 2.0**-32).view(len(key), *shape)


def normal(key: Key, *shape: int, stream: int = 0) -> Float[Tensor, "B ..."]:
    """Standard normal numbers, two from two words by the transform of Box and Muller (1958).

    r cos θ and r sin θ with r = √(−2 ln u): u in (0, 1] from 31 bits, θ in [−π, π) from 32. The
    largest that may come is 6.6.
    """
    num = math.prod(shape)
    first, second = _words(key, stream, 2 * -(-num // 2)).view(len(key), 2, -1).double().unbind(1)
    radius = ((first.abs() + 0.5) * 2.0**-31).clamp_(max=1).log_().mul_(-2).sqrt_()
    angle = second.mul_(math.pi * 2.0**-31)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return both[:, :num].reshape(len(key), *shape)


def _words(key: Key, stream: int, num: int) -> Int32[Tensor, "B num"]:
    """Words of 32 bits, two from each hash."""
    own = _hashed(key, torch.full((), stream, device=key.device))
    places = torch.arange(-(-num // 2), device=key.device)
    return _hashed(own[:, None], places).view(torch.int32)[:, :num]


def _hashed(state: Int64[Tensor, "..."], part: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """`hash64(state, part)`, its bits as signed numbers: products wrap around alike."""
    z = state + (part + 1) * -0x61C8864680B583EB  # hashing's γ, less 2^64, as are those below
    z = (z ^ _shifted(z, 30)).mul_(-0x40A7B892E31B1A47)
    z = (z ^ _shifted(z, 27)).mul_(-0x6B2FB644ECCEEE15)
    return z ^ _shifted(z, 31)


def _shifted(z: Int64[Tensor, "..."], by: int) -> Int64[Tensor, "..."]:
    """Shifted to the right with zeros from the left, where torch repeats the sign."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)
