"""Random numbers as a pure function of what they are for.

Guy Steele, Doug Lea, Christine Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, made odd


def hash64(seed: int, *parts: int | NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    """Uniform 64-bit numbers that depend on `seed` and `parts` alone, whatever the machine.

    h_0 = seed, h_k = mix(h_(k-1) + (part_k + 1) γ) modulo 2^64, where mix and γ are those of
    SplitMix64: `hash64(seed, n)` is the n-th output of that generator, and every further part
    splits off a generator of its own.

    Args:
        seed: Any integer; integers equal modulo 2^64 are the same seed, as for the parts.
        parts: Integers or arrays of them, broadcast together; their order matters.

    Returns:
        One number for each element of the broadcast parts.
    """
    state = _uint64(seed)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        for part in parts:
            state = _mix(state + (_uint64(part) + np.uint64(1)) * _GAMMA)
    return np.asarray(state)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _uint64(value: int | NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    if isinstance(value, int):
        value %= 2**64
    return np.asarray(value).astype(np.uint64)
