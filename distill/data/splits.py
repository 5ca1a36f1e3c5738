"""Class-balanced parts of a training split, as pure functions of a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int

from distill.data.hashing import hash64

# Keep the draws of the two splits apart from each other and from those of any sample.
_HELD_OUT = int.from_bytes(b"held out", "big")
_SUBSET = int.from_bytes(b"fraction", "big")

Ids = Int[np.ndarray, " N"]


def held_out(labels: Int[np.ndarray, " N"], val: float, seed: int) -> tuple[Ids, Ids]:
    """Split ids 0..N-1 into those to train on and those held out for validation.

    Of every class with n images round(val * n) are held out, at least 1 and at most n - 1, in the
    order of a hash of (seed, id). A class with one image keeps it for training.

    Args:
        labels: Class of every sample.
        val: Part to hold out, in [0, 1); 0 holds out nothing.
        seed: Decides which samples.

    Returns:
        The sorted ids to train on, and the sorted ids held out.
    """

    def count(size: int) -> int:
        return min(max(round(val * size), 1), size - 1)

    ids = np.arange(len(labels))
    if not val:
        return ids, ids[:0]
    chosen = _first_of_each_class(ids, labels, hash64(seed, _HELD_OUT, ids), count)
    return ids[~chosen], ids[chosen]


def subset(ids: Ids, labels: Int[np.ndarray, " M"], fraction: float, seed: int) -> Ids:
    """The part of `ids` that is used when only `fraction` of the images may be.

    Of every class with n images max(1, round(fraction * n)) are kept, in the order of a hash of
    (seed, id). So the subset for a smaller fraction lies within that for a larger one.

    Args:
        ids: Sorted sample ids to choose from.
        labels: Class of every sample of the split, so that `labels[ids]` are those of `ids`.
        fraction: Part to keep, in (0, 1].
        seed: Decides which samples.

    Returns:
        The sorted ids that are kept.
    """

    def count(size: int) -> int:
        return max(round(fraction * size), 1)

    if fraction == 1:
        return ids
    kept = _first_of_each_class(ids, labels[ids], hash64(seed, _SUBSET, ids), count)
    return np.asarray(ids[kept])


def _first_of_each_class(
    ids: Ids, labels: Ids, order: Int[np.ndarray, " N"], count: Callable[[int], int]
) -> Bool[np.ndarray, " N"]:
    """A mask of the `count(size of its class)` samples of each class that come first in `order`."""
    chosen = np.zeros(len(ids), dtype=bool)
    by_class = np.lexsort((order, labels))
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    for start, size in zip(starts, sizes, strict=True):
        chosen[by_class[start : start + count(int(size))]] = True
    return chosen
