"""Random numbers of a term, as a pure function of which view of which sample they are for."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from distill.types import Batch

# SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014), its
# constants as signed integers: the products are the same modulo 2^64.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def uniform(batch: Batch, count: int, *, salt: int) -> Float[Tensor, "B count"]:
    """Numbers in [0, 1) that no order, batch or device changes.

    Args:
        batch: Whose ids and views they follow.
        count: Numbers a sample.
        salt: Tells terms apart.
    """
    state = _mix(_next(torch.full_like(batch.ids, salt).long(), batch.ids))
    return _numbers(_mix(_next(state, batch.views)), count)


def uniform_of(step: Tensor, count: int, *, salt: int) -> Float[Tensor, " count"]:
    """Numbers in [0, 1) that a step draws for all its samples, on every process the same."""
    return _numbers(_mix(_next(torch.full_like(step, salt), step)), count)


def _numbers(state: Tensor, count: int) -> Tensor:
    numbers = torch.arange(count, device=state.device)
    bits = _mix(_next(state[..., None], numbers)) & ((1 << 24) - 1)
    return bits.float() / (1 << 24)


def _next(state: Tensor, part: Tensor) -> Tensor:
    return state + (part.long() + 1) * _GAMMA


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros filled in: on signed integers the sign would be."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
