"""Intervals cover what they should, plateaus are the paired ones, curves give the known numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import isotonic_regression

from distill import statistics
from distill.statistics import Curve

# The example curves of "accuracy over training images" that the toolkit's first article prints.
SIZES = np.array([1_000, 5_000, 10_000, 50_000, 100_000, 500_000])
CNN = Curve(SIZES, np.array([45, 62, 71, 79, 83, 85]) / 100)
VIT = Curve(SIZES, np.array([38, 52, 64, 75, 81, 85]) / 100)
HYBRID = Curve(SIZES, np.array([48, 65, 73, 80, 84, 86]) / 100)


def rights(rate: float, images: int, seeds: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, images)) < rate


def test_the_examples_data_multipliers() -> None:
    assert statistics.data_multiplier(CNN, VIT) == pytest.approx(2.08, abs=0.005)
    assert statistics.data_multiplier(HYBRID, VIT) == pytest.approx(2.74, abs=0.005)
    assert statistics.data_multiplier(HYBRID, CNN) == pytest.approx(1.33, abs=0.005)


def test_the_examples_areas() -> None:
    found = [statistics.area(curve) for curve in (CNN, VIT, HYBRID)]
    assert found == pytest.approx([0.715, 0.663, 0.733], abs=0.0005)


def test_a_multiplier_is_one_with_itself_and_the_inverse_the_other_way_round() -> None:
    assert statistics.data_multiplier(VIT, VIT) == 1
    there, back = (statistics.data_multiplier(*pair) for pair in ((CNN, VIT), (VIT, CNN)))
    assert there is not None
    assert back is not None
    assert there * back == pytest.approx(1)


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_a_curve_that_needs_so_many_times_the_images_has_that_multiplier(factor: float) -> None:
    slower = Curve(SIZES * factor, CNN.accuracy)
    assert statistics.data_multiplier(CNN, slower) == pytest.approx(factor)


def test_a_multiplier_is_the_mean_of_the_gap_in_log_images_over_a_fine_grid() -> None:
    accuracies = np.linspace(0.45, 0.85, 40_001)  # that both reach
    ours, theirs = (np.interp(accuracies, c.accuracy, np.log10(SIZES)) for c in (CNN, VIT))
    assert statistics.data_multiplier(CNN, VIT) == pytest.approx(
        10 ** (theirs - ours).mean(), rel=1e-4
    )


def test_there_is_no_multiplier_without_an_accuracy_in_common() -> None:
    better = Curve(SIZES, CNN.accuracy + 0.5)
    assert statistics.data_multiplier(CNN, better) is None


def test_a_dip_is_smoothed_before_curves_are_inverted() -> None:
    dipped = Curve(SIZES, np.array([0.45, 0.62, 0.60, 0.79, 0.83, 0.85]))
    flat = Curve(SIZES, np.array([0.45, 0.61, 0.61, 0.79, 0.83, 0.85]))
    assert statistics.data_multiplier(dipped, VIT) == pytest.approx(
        statistics.data_multiplier(flat, VIT)
    )


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12))
def test_isotonic_rises_and_is_the_nearest_that_does(values: list[float]) -> None:
    found = statistics.isotonic(np.array(values))
    assert (np.diff(found) >= 0).all()
    assert found == pytest.approx(isotonic_regression(np.array(values)), abs=1e-9)


def test_an_interval_is_as_wide_as_the_binomial_one() -> None:
    rows = rights(0.8, 4_000)
    found = statistics.estimate(rows.mean(), statistics.bootstrap([rows])[0])
    p = rows.mean()
    assert found.se == pytest.approx((p * (1 - p) / 4_000) ** 0.5, rel=0.1)
    assert found.ci95[1] - found.ci95[0] == pytest.approx(2 * 1.96 * found.se, rel=0.1)
    assert found.ci95[0] < p < found.ci95[1]


def test_seeds_that_differ_widen_an_interval_and_seeds_that_agree_do_not() -> None:
    one = rights(0.8, 2_000)
    agreeing = np.repeat(one, 4, axis=0)
    differing = np.concatenate(
        [rights(rate, 2_000, seed=i) for i, rate in enumerate((0.6, 1.0) * 2)]
    )
    narrow, same, wide = (
        statistics.estimate(rows.mean(), statistics.bootstrap([rows])[0]).se
        for rows in (one, agreeing, differing)
    )
    assert same == pytest.approx(narrow, rel=0.15)
    assert wide > 5 * narrow


def test_draws_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rights(0.7, 300, seeds=3)
    means = statistics.bootstrap([rows, rows]).mean()
    monkeypatch.setattr(statistics, "_CHUNK", 900)
    assert statistics.bootstrap([rows, rows]).mean() == pytest.approx(means, abs=1e-3)
    assert statistics.bootstrap([rows]).shape == (1, statistics.RESAMPLES)


def test_what_settings_have_in_common_cancels_on_a_plateau() -> None:
    # Two settings that differ in 4 of 2,000 images: far below the error of either, and yet above
    # the error of their difference, since all four go the same way.
    best = rights(0.8, 2_000)
    worse, near = best.copy(), best.copy()
    worse[0, np.flatnonzero(best[0])[:4]] = False
    # One that is right on others: as many gained as lost but one.
    near[0, np.flatnonzero(best[0])[:40]] = False
    near[0, np.flatnonzero(~best[0])[:39]] = True
    rows = [worse, best, near]
    values = np.array([one.mean() for one in rows])
    draws = statistics.bootstrap(rows)
    assert statistics.plateau(values, draws, 1) == [1, 2]


def test_a_setting_that_answers_alike_is_on_the_plateau() -> None:
    rows = rights(0.5, 100)
    draws = statistics.bootstrap([rows, rows])
    assert statistics.plateau(np.array([rows.mean()] * 2), draws, 0) == [0, 1]
