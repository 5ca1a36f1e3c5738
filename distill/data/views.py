"""What an augmented view is made of: pure functions of the seed, the sample and the view's number.

Nothing here has a state, so a view is the same in any batch, on any machine, after any restart.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from distill.data.hashing import hash64

# What was computed from views belongs to one version: raise it when any of them changes.
VERSION = 1

# First parts of a hash, so that numbers drawn for one purpose are independent of all others.
_UNIFORMS, _PAIRS, _EPOCH, _SHARDS = 1, 2, 3, 4

_CHUNK = 65_536  # samples whose places are found at once


def uniform(
    seed: int, ids: Int[ndarray, " n"], views: Int[ndarray, " n"] | int, *, stream: int, num: int
) -> Float[ndarray, "n num"]:
    """Numbers in [0, 1) that depend on the seed, sample, view and stream alone.

    Args:
        seed: The recipe's `data.seed`.
        ids: Samples.
        views: The view of each sample, or one for all.
        stream: What the numbers are for; streams are independent of each other.
        num: Numbers per sample.

    Returns:
        float64, with all 53 bits of the mantissa drawn.
    """
    views = np.asarray(views)
    bits = hash64(seed, _UNIFORMS, stream, ids[:, None], views[..., None], np.arange(num))
    return (bits >> np.uint64(11)) * 2.0**-53


class Permutation:
    """A keyed permutation of 0 … n−1 that gives any element without making the others.

    Four Feistel rounds permute the numbers of 2b bits, the fewest that reach n; a result of n or
    more is permuted again until it falls below n, which keeps the whole a permutation of 0 … n−1.
    Four rounds with independent functions are a strong pseudorandom permutation (Luby, Rackoff:
    How to Construct Pseudorandom Permutations from Pseudorandom Functions, 1988).
    """

    def __init__(self, n: int, key: int) -> None:
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._n = np.uint64(n)
        self._shift = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        self._keys = [int(hash64(key, number)) for number in range(4)]

    def __call__(self, positions: Int[ndarray, " m"]) -> Int[ndarray, " m"]:
        """The elements at `positions`."""
        return self._walk(positions, inverse=False)

    def inverse(self, elements: Int[ndarray, " m"]) -> Int[ndarray, " m"]:
        """The positions of `elements`."""
        return self._walk(elements, inverse=True)

    def _walk(self, values: Int[ndarray, " m"], *, inverse: bool) -> Int[ndarray, " m"]:
        rounds = self._unrounds if inverse else self._rounds
        found = rounds(values.astype(np.uint64))
        outside = np.flatnonzero(found >= self._n)
        while outside.size:
            found[outside] = rounds(found[outside])
            outside = outside[found[outside] >= self._n]
        return found.astype(np.int64)

    def _rounds(self, values: ndarray) -> ndarray:
        left, right = values >> self._shift, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (hash64(key, right) & self._mask)
        return (left << self._shift) | right

    def _unrounds(self, values: ndarray) -> ndarray:
        left, right = values >> self._shift, values & self._mask
        for key in reversed(self._keys):
            left, right = right ^ (hash64(key, left) & self._mask), left
        return (left << self._shift) | right


def epoch_order(
    n: int, *, data_seed: int, train_seed: int, epoch: int, view: int
) -> Int[ndarray, " n"]:
    """The order in which an epoch reads `n` samples, mixing partners side by side.

    The view's own permutation pairs the samples, neighbour with neighbour; the epoch shuffles the
    pairs. So the partners of a view are the same whichever epoch reads it, and a batch of even
    size holds whole pairs. With n odd the sample without a partner comes last.

    Args:
        n: Number of samples.
        data_seed: The recipe's `data.seed`: decides the pairs.
        train_seed: The recipe's `train.seed`: decides the order of the pairs.
        epoch: Which pass over the samples.
        view: Which view of every sample the epoch reads.

    Returns:
        Each of 0 … n−1 once.
    """
    pairs, order = n // 2, np.arange(n)
    shuffle = Permutation(pairs, int(hash64(train_seed, _EPOCH, epoch)))
    pairing = _pairing(n, data_seed, view)
    for first in range(0, n, _CHUNK):  # each step of a permutation takes memory of its own
        chunk = order[first : first + _CHUNK]
        whole = chunk[: 2 * pairs - first]
        whole[:] = 2 * shuffle(whole // 2) + whole % 2
        chunk[:] = pairing(chunk)
    return order


def shard_order(
    ends: Int[ndarray, " s"], *, mixed: int, train_seed: int, epoch: int
) -> Int[ndarray, " n"]:
    """The order in which an epoch reads samples that lie in shards, some shards at a time.

    The epoch shuffles the shards, and takes them `mixed` at a time; the samples of these are
    shuffled with each other.

    Args:
        ends: How many samples there are up to the end of every shard.
        mixed: Shards that are read at a time.
        train_seed: The recipe's `train.seed`.
        epoch: Which pass over the samples.

    Returns:
        Each of 0 … n−1 once, where n is the last of `ends`.
    """
    key = int(hash64(train_seed, _SHARDS, epoch))
    shards = Permutation(len(ends), key)(np.arange(len(ends)))
    starts = np.concatenate([[0], ends[:-1]])
    order, first = np.empty(int(ends[-1]), np.int64), 0
    for group in range(0, len(shards), mixed):
        these = shards[group : group + mixed]
        samples = np.concatenate([np.arange(starts[i], ends[i]) for i in these])
        shuffle = Permutation(len(samples), int(hash64(key, group)))
        order[first : first + len(samples)] = samples[shuffle(np.arange(len(samples)))]
        first += len(samples)
    return order


def partner(
    positions: Int[ndarray, " m"], n: int, *, data_seed: int, view: int
) -> Int[ndarray, " m"]:
    """The sample that each of `positions` is mixed with in a view of `n` samples.

    The partner's partner is the sample itself; with n odd, one sample is its own partner.
    """
    pairing = _pairing(n, data_seed, view)
    neighbour = pairing.inverse(positions) ^ 1
    return pairing(np.where(neighbour < n, neighbour, n - 1))


def pairs(
    positions: Int[ndarray, " m"], n: int, *, data_seed: int, view: int
) -> tuple[Int[ndarray, "p 2"], Int[ndarray, " m"]]:
    """The pairs of a view of `n` samples that these samples belong to, each pair once.

    Returns:
        The pairs, each in its own order, and where each of `positions` stands among their
        elements. A sample without a partner is a pair with itself.
    """
    pairing = _pairing(n, data_seed, view)
    places = pairing.inverse(positions)
    found, pair = np.unique(places // 2, return_inverse=True)
    both = np.minimum(2 * found[:, None] + np.arange(2), n - 1)
    return pairing(both.ravel()).reshape(-1, 2), 2 * pair + places % 2


def _pairing(n: int, data_seed: int, view: int) -> Permutation:
    return Permutation(n, int(hash64(data_seed, _PAIRS, view)))
