"""Data sets from which one thing was taken away: what is learned from the rest shows what it did.

Random labels are the randomisation test of Zhang, Bengio, Hardt, Recht, Vinyals: Understanding Deep
Learning Requires Rethinking Generalization, ICLR 2017, arXiv:1611.03530.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Int64, UInt8

from distill.data.hashing import hash64

# Keep these draws apart from each other and from those of any sample.
_PIXELS = int.from_bytes(b"pixels", "big")
_LABELS = int.from_bytes(b"labels", "big")


def permuted_pixels(
    pixels: UInt8[np.ndarray, "N H W C"], *, seed: int
) -> UInt8[np.ndarray, "N H W C"]:
    """The images with their pixels rearranged, all in the same way.

    What is where is still the same in all images, but neighbours are no longer alike: a network to
    which an image is a list of numbers loses nothing, one that expects structure in the plane does.

    Args:
        pixels: The images; their channels stay together.
        seed: Decides the permutation, along with the size.
    """
    flat = pixels.reshape(len(pixels), -1, pixels.shape[-1])
    # Not by flat[:, order], which puts the images last in memory.
    return np.take(flat, pixel_order(flat.shape[1], seed=seed), axis=1).reshape(pixels.shape)


def permuted_labels(
    labels: Int64[np.ndarray, " N"], ids: Int[np.ndarray, " T"], *, seed: int
) -> Int64[np.ndarray, " N"]:
    """The labels with those of the samples `ids` dealt out again among these.

    Each class keeps its number of them, and nothing about an image tells its label: whoever learns
    them is right on other images by chance alone.

    Args:
        labels: Of every sample.
        ids: Whose labels are permuted.
        seed: Decides the permutation, along with the ids.
    """
    permuted = labels.copy()
    permuted[ids] = labels[ids[np.argsort(hash64(seed, _LABELS, ids), kind="stable")]]
    return permuted


def pixel_order(count: int, *, seed: int) -> Int[np.ndarray, " count"]:
    """Which of `count` positions each gets its pixel from: a permutation, the same on any machine.

    Args:
        count: Pixels of an image.
        seed: Decides the permutation.
    """
    return np.argsort(hash64(seed, _PIXELS, np.arange(count)), kind="stable")
