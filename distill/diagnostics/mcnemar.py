"""Whether two networks differ in more images than chance would have it.

McNemar: Note on the Sampling Error of the Difference Between Correlated Proportions or
Percentages, 1947.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool


class McNemar(NamedTuple):
    """The images on which only one is right, and how probable such an uneven split is."""

    first_only: int  # b: the first is right, the second wrong
    second_only: int  # c
    p: float  # exact, two-sided
    mid_p: float


def mcnemar(first: Bool[np.ndarray, " N"], second: Bool[np.ndarray, " N"]) -> McNemar:
    """McNemar's exact test of two networks on the same images.

    If both are equally good, the b + c images that only one gets right are coin tosses:
    p = min(1, 2 P(X ≤ min(b, c))) with X binomial of b + c tosses. It errs to the safe side, as X
    is discrete; the mid-p, 2 P(X ≤ min(b, c)) − P(X = min(b, c)), counts what was seen by half and
    comes nearer to the level it names (Fagerland, Lydersen, Laake: The McNemar Test for Binary
    Matched-Pairs Data, 2013). Training again with another seed is in neither.

    Args:
        first: Whether the first network gets each image right.
        second: Whether the second does.

    Returns:
        Counts and probabilities; both p are 1 where the two are right on the same images.
    """
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    tosses, fewer = b + c, min(b, c)
    # Whole numbers, so that no count is too large; terms below the first shrink by k / (n − k + 1).
    seen = math.comb(tosses, fewer) / 2**tosses
    k = np.arange(fewer, 0, -1)
    tail = seen * (1 + float(np.cumprod(k / (tosses - k + 1)).sum()))
    return McNemar(b, c, p=min(1.0, 2 * tail), mid_p=min(1.0, 2 * tail - seen))
