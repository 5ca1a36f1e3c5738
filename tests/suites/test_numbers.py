"""Numbers carry intervals that are those of a plain bootstrap over images and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from distill import evaluate, suites
from distill.definitions import Number, definitions, shown
from distill.diagnostics.calibration import adaptive_ece, adaptive_gaps
from distill.statistics import resampled
from distill.suites.clean import _error


def plain(values: np.ndarray, *, resamples: int = 4000) -> tuple[float, float]:
    """Percentiles of the mean over drawn seeds and drawn images, drawn one by one."""
    draw = np.random.default_rng(1)
    seeds, images = values.shape
    means = []
    for _ in range(resamples):
        rows = draw.integers(seeds, size=seeds)
        columns = draw.integers(images, size=images)
        means.append(values[np.ix_(rows, columns)].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_mean_has_the_interval_of_a_nested_bootstrap(seeds: int) -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=(seeds, 200)) + 0.5 * draw.normal(size=(seeds, 1))
    found = suites.mean(list(values))
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert (found.n, found.seeds) == (200, seeds)
    assert found.ci95 == pytest.approx(plain(values), abs=0.15 * np.ptp(plain(values)))


def test_a_ratio_is_resampled_above_and_below_together() -> None:
    draw = np.random.default_rng(0)
    below = draw.random(400) < 0.3
    above = below & (draw.random(400) < 0.8)
    found = suites.ratio([above], [below])
    assert found.value == pytest.approx(above.sum() / below.sum(), abs=1e-12)
    ratios = []
    for _ in range(4000):
        chosen = draw.integers(400, size=400)
        ratios.append(above[chosen].sum() / below[chosen].sum())
    expected = np.quantile(ratios, [0.025, 0.975])
    assert found.ci95 == pytest.approx(tuple(expected), abs=0.015)


def test_a_ratio_of_nothing_has_no_value() -> None:
    none = np.zeros(5, bool)
    found = suites.ratio([none], [none])
    assert found.value is None
    assert found.reason


def test_a_calibration_error_is_in_its_interval_though_resamples_are_larger() -> None:
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0.3, 1, size=500)
    correct = draw.random(500) < confidence  # perfectly calibrated: all of its error is chance
    found = _error([evaluate.gaps(confidence, correct)])
    assert found.value == pytest.approx(evaluate.ece(confidence, correct), abs=1e-12)
    assert found.ci95 is not None
    low, high = found.ci95
    assert 0 <= low < found.value < high
    gaps = [evaluate.gaps(confidence, correct)[None, :, b] for b in range(evaluate.BINS)]
    draws = resampled(gaps, lambda means: np.abs(means).sum(axis=0))
    assert np.quantile(draws, 0.1) > found.value * 0.9  # so the percentile interval would be off


def test_the_adaptive_error_is_that_of_its_definition() -> None:
    draw = np.random.default_rng(0)
    for n in (7, 100, 333):
        confidence = draw.choice(np.linspace(0.2, 1, 40), size=n)  # with ties
        correct = draw.random(n) < confidence
        found = _error([adaptive_gaps(confidence, correct)])
        assert found.value == pytest.approx(adaptive_ece(confidence, correct), abs=1e-12)


def test_several_draws_have_the_interval_of_their_mean() -> None:
    found = suites.spread([1.0, 2.0, 3.0])
    half = 1.96 / np.sqrt(3)
    assert found.value == 2.0
    assert found.ci95 == pytest.approx((2 - half, 2 + half))
    assert suites.spread([4.0]) == Number(4.0)


def test_every_definition_says_what_it_is() -> None:
    found = definitions()
    assert len(found) > 60
    for name, one in found.items():
        assert one.text.endswith("."), name
        assert one.version >= 1
        assert shown(name, Number(0.1234, (0.1, 0.2)))
    titles = [(one.suite, one.title) for one in found.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(
    ("name", "number", "text"),
    [
        ("top1", Number(0.9123, (0.9, 0.92)), "91.23 % [90.00, 92.00]"),
        ("gain", Number(-0.0123, (-0.02, 0.001)), "-1.23 points [-2.00, +0.10]"),
        ("parameters", Number(9999), "9,999"),
        ("parameters", Number(11_689_512), "11.69 M"),
        ("flops", Number(3.638e9), "3.638 G"),
        ("file_bytes", Number(46_800_000), "46.8 MB"),
        ("latency_1_p50", Number(12.345), "12.3 ms"),
        ("throughput", Number(12345.6), "12,346 /s"),
        ("cka", Number(None, reason="it has no vector"), "not defined: it has no vector"),
    ],
)
def test_numbers_as_people_read_them(name: str, number: Number, text: str) -> None:
    assert shown(name, number) == text


def test_numbers_as_programs_read_them() -> None:
    assert Number(0.5, (0.4, 0.6), 100, 3).to_json("top1") == {
        "value": 0.5,
        "ci95": [0.4, 0.6],
        "n": 100,
        "seeds": 3,
        "definition_version": 1,
    }
    assert Number(None, reason="why").to_json("top1")["reason"] == "why"
