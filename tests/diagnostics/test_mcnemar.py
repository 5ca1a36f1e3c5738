"""The exact test is scipy's binomial one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from distill.diagnostics.mcnemar import mcnemar


def pair(b: int, c: int, both: int = 3, neither: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Answers of which b only the first gets right, and c only the second."""
    first = np.repeat([True, False, True, False], [b, c, both, neither])
    second = np.repeat([False, True, True, False], [b, c, both, neither])
    order = np.random.default_rng(0).permutation(len(first))
    return first[order], second[order]


def test_p_is_that_of_the_binomial_test() -> None:
    draw = np.random.default_rng(0)
    for size in (6, 60, 600, 6_000):
        for b, c in draw.integers(size, size=(60, 2)):
            found = mcnemar(*pair(b, c))
            assert (found.first_only, found.second_only) == (b, c)
            if not b + c:
                continue
            expected = binomtest(b, b + c).pvalue
            assert found.p == pytest.approx(expected, rel=1e-10, abs=1e-12)
            fewer = min(b, c)
            mid = 2 * binom.cdf(fewer, b + c, 0.5) - binom.pmf(fewer, b + c, 0.5)
            assert found.mid_p == pytest.approx(mid, rel=1e-10, abs=1e-12)


def test_p_of_large_counts() -> None:
    for b, c in ((24_500, 25_500), (50_000, 50_300), (10, 40_000)):
        found = mcnemar(*pair(b, c))
        assert found.p == pytest.approx(binomtest(b, b + c).pvalue, rel=1e-9, abs=1e-300)
        assert 0 <= found.mid_p <= found.p


@pytest.mark.parametrize(
    ("b", "c", "p", "mid_p"),
    [
        (0, 0, 1.0, 1.0),
        (1, 0, 1.0, 0.5),
        (0, 6, 2 / 64, 1 / 64),
        (7, 7, 1.0, 1.0),
        (2, 10, 2 * 79 / 4096, (2 * 79 - 66) / 4096),
    ],
)
def test_p_by_hand(b: int, c: int, p: float, mid_p: float) -> None:
    found = mcnemar(*pair(b, c))
    assert (found.p, found.mid_p) == pytest.approx((p, mid_p), rel=1e-14)
    assert mcnemar(*pair(c, b))[2:] == found[2:]


def test_images_that_both_get_right_or_wrong_change_nothing() -> None:
    assert mcnemar(*pair(5, 14, both=0, neither=0)) == mcnemar(*pair(5, 14, both=900, neither=50))
