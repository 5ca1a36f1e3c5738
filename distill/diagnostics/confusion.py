"""Which classes a network takes for which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Classes(NamedTuple):
    """How well each class is told from the others; NaN for a class without images.

    For such a class each would be 0 or 0/0 by its absence, which says nothing of the network.
    """

    support: Int[np.ndarray, " K"]  # its images
    recall: Float[np.ndarray, " K"]  # of its images, those that are recognised: its accuracy
    precision: Float[np.ndarray, " K"]  # of its predictions, those that are right; NaN without any
    f1: Float[np.ndarray, " K"]  # their harmonic mean


class Confused(NamedTuple):
    """Images of one class that are taken for another."""

    label: int
    predicted: int
    images: int
    share: float  # of the label's images


def confusion(
    labels: Int[np.ndarray, " N"], predicted: Int[np.ndarray, " N"], num_classes: int
) -> Int[np.ndarray, "K K"]:
    """How many images of each class (row) are given each class (column)."""
    pairs = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def by_class(counts: Int[np.ndarray, "K K"]) -> Classes:
    """Recall TP / (TP + FN), precision TP / (TP + FP) and F1 = 2 TP / (2 TP + FP + FN).

    Args:
        counts: As `confusion` gives them.
    """
    right, support, told = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    return Classes(
        support,
        recall=_share(right, support),
        precision=_share(np.where(support, right, 0), np.where(support, told, 0)),
        f1=_share(2 * right, np.where(support, support + told, 0)),
    )


def balanced_accuracy(counts: Int[np.ndarray, "K K"]) -> float:
    """Mean recall over the classes that have images, in [0, 1]."""
    return float(np.nanmean(by_class(counts).recall))


def macro_f1(counts: Int[np.ndarray, "K K"]) -> float:
    """Mean F1 over the classes that have images, in [0, 1]."""
    return float(np.nanmean(by_class(counts).f1))


def top_confusions(counts: Int[np.ndarray, "K K"], most: int = 10) -> list[Confused]:
    """The pairs of classes that are confused most often, by images; equal ones in class order.

    Args:
        counts: As `confusion` gives them.
        most: How many at most; pairs that are never confused are left out.
    """
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[: min(most, np.count_nonzero(wrong))]
    support = counts.sum(axis=1)
    pairs = (divmod(int(place), len(counts)) for place in order)
    return [Confused(i, j, int(wrong[i, j]), float(wrong[i, j] / support[i])) for i, j in pairs]


def _share(part: Int[np.ndarray, " K"], whole: Int[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    return np.where(whole, part / np.maximum(whole, 1), np.nan)
